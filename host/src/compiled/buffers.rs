//! Which value lies in which buffer: each gets one when it is made, and leaves it to another once nobody reads it any more.

use super::{Place, Step};
use std::collections::HashMap;

/// Some numbers: a value until buffers are shared out.
pub(super) struct Made {
    pub(super) len: usize,
    /// Numbers that never change.
    pub(super) constant: Option<Vec<f32>>,
}

/// Puts the numbers of buffers in place of those of values; where the logits are, besides.
pub(super) fn share_out(mut steps: Vec<Step>, made: Vec<Made>, logits: usize) -> (Vec<Step>, Vec<Vec<f32>>, Place) {
    let mut last = vec![0; made.len()];
    for (at, step) in steps.iter().enumerate() {
        step.reads.iter().chain(&step.writes).for_each(|&value| last[value] = at);
    }
    last[logits] = steps.len();
    let (mut buffers, mut place) = (Vec::new(), vec![usize::MAX; made.len()]);
    for (value, made) in made.iter().enumerate() {
        if let Some(constant) = &made.constant {
            place[value] = buffers.len();
            buffers.push(constant.clone());
            last[value] = steps.len();
        }
    }
    let mut free: HashMap<usize, Vec<Place>> = HashMap::new();
    for (at, step) in steps.iter_mut().enumerate() {
        for write in &mut step.writes {
            let len = made[*write].len;
            place[*write] = free.get_mut(&len).and_then(Vec::pop).unwrap_or_else(|| {
                buffers.push(vec![0.0; len]);
                buffers.len() - 1
            });
        }
        let mut done: Vec<usize> = step.reads.iter().chain(&step.writes).copied().filter(|&v| last[v] == at).collect();
        done.sort_unstable();
        done.dedup();
        done.into_iter().for_each(|value| free.entry(made[value].len).or_default().push(place[value]));
        step.reads.iter_mut().chain(&mut step.writes).for_each(|value| *value = place[*value]);
    }
    (steps, buffers, place[logits])
}

#[cfg(test)]
mod tests {
    use super::{super::Kernel, *};

    fn step(reads: &[usize], writes: &[usize]) -> Step {
        Step { kernel: Kernel::Positions, reads: reads.to_vec(), writes: writes.to_vec() }
    }

    #[test]
    fn a_buffer_passes_on_when_its_value_was_read_for_the_last_time() {
        let value = |len| Made { len, constant: None };
        let constant = Made { len: 2, constant: Some(vec![3.0, 4.0]) };
        // Value 3 is the constant, and 6 the logits.
        let made = vec![value(2), value(2), value(2), constant, value(2), value(5), value(2)];
        let steps = vec![step(&[], &[0]), step(&[0, 3], &[1, 2]), step(&[1], &[4, 5]), step(&[2, 4], &[6])];
        let (steps, buffers, logits) = share_out(steps, made, 6);
        assert_eq!(buffers.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2, 2, 2, 5]);
        assert_eq!(buffers[0], [3.0, 4.0]);
        // What is read stays apart from what is written, and the first value's place is the fourth's.
        assert_eq!(steps[2].writes[0], steps[0].writes[0]);
        for step in &steps {
            assert!(step.writes.iter().all(|write| !step.reads.contains(write) && *write != 0));
        }
        assert_eq!(steps[3].writes, [logits]);
    }
}
