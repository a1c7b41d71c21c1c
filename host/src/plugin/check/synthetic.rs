//! A checkpoint for an architecture that nobody has trained: names and shapes are those that the plugin asks for when it finds none, the
//! numbers a pure function of (seed, name, index). So a plugin can be run, and run again, with nothing but a configuration.
//!
//! A plugin that looks which layout is there (`has`) finds none at first, which most answer with the layout of the Hub; what it then asks
//! for is there the second time.

use super::{Outcome, Stop};
use crate::{
    config::Config,
    kernels::cpu::{Float, Format, Matrix},
    model::Plan,
    plugin::library::Library,
    weights::{
        checkpoint::Checkpoint,
        plan::Wanted,
        recipe::Recipe,
        stored::{Dtype, Stored},
    },
};
use std::{collections::BTreeMap, path::Path, sync::Arc};

/// More numbers than an example should have: it is to be tried in a moment.
pub const MOST_NUMBERS: usize = 16 << 20;

/// Times that a plugin may look at what it asked for and ask for something else.
const ROUNDS: usize = 4;

/// A tensor to be made: its shape, and where its numbers lie.
#[derive(Clone, Debug, PartialEq)]
struct Made {
    shape: Vec<usize>,
    center: f32,
    width: f32,
    /// Told by a reshape, which leaves open how the numbers lie in the file.
    loose: bool,
    /// Whole numbers: which experts a token goes to.
    ids: bool,
}

/// The tensors that an architecture asks for, by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Demand(BTreeMap<String, Made>);

/// What weights are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Zeros, for where only shapes matter.
    Zeros,
    /// Numbers in f32.
    Numbers,
    /// Numbers in 4 bits with MLX's groups, where they fit.
    Packed,
    /// The numbers that those 4 bits stand for, in f32.
    Unpacked,
}

/// Values that share a scale.
pub const GROUP: usize = 32;

impl Demand {
    /// Asks the plugin what it needs for `config`.
    pub fn learn(library: &Library, config: &Config) -> Outcome<Demand> {
        let mut demand = Demand::default();
        for _ in 0..ROUNDS {
            let plan = Plan::by(library, config.clone(), demand.checkpoint(Fill::Zeros, 0)?)?;
            if plan.report.agrees() {
                return Ok(demand);
            }
            let next = Demand::of(&plan.wanted);
            if next == demand {
                return Err(Stop::fail(format!("of the tensors that it asks for itself: {}", plan.report)));
            }
            demand = next;
        }
        Err(Stop::fail("it asks for other tensors whenever it finds those that it asked for before"))
    }

    /// What these slots are made of.
    pub fn of(wanted: &[Wanted]) -> Demand {
        let mut demand = Demand::default();
        for slot in wanted {
            for (index, (recipe, dims)) in slot.recipes().into_iter().enumerate() {
                let inputs = |dims: &[usize]| (3.0 / dims.last().copied().unwrap_or(1).max(1) as f32).sqrt();
                let (center, width) = match slot {
                    Wanted::Norm { weight: Some(_), .. } if index == 0 => (1.0, 0.25),
                    Wanted::Embedding { .. } => (0.0, 1.0),
                    Wanted::Parameter { .. } => (0.5, 0.25),
                    _ if dims.len() > 1 => (0.0, inputs(&dims)),
                    _ => (0.0, 0.125),
                };
                demand.need(recipe, Some(&dims), (center, width));
            }
            // What is looked up and is no weight is looked up again elsewhere.
            if let Wanted::Embedding { weight: Recipe::Stored(name), .. } = slot
                && let Some(made) = demand.0.get_mut(name).filter(|_| !name.ends_with(".weight"))
            {
                made.ids = true;
            }
        }
        demand
    }

    /// What `recipe` reads, for it to give `dims` and numbers of that center and width.
    fn need(&mut self, recipe: &Recipe, dims: Option<&[usize]>, (center, width): (f32, f32)) {
        let known = given(recipe);
        let dims = known.as_deref().or(dims);
        let range = (center, width);
        match recipe {
            Recipe::Stored(name) => self.put(name, dims, range, false),
            Recipe::Numbers(_) => {}
            Recipe::UnitRows(inner, _) => self.need(inner, dims, range),
            Recipe::Affine(inner, times, plus) => {
                let times = if *times == 0.0 { 1.0 } else { *times };
                self.need(inner, dims, ((center - plus) / times, width / times.abs()));
            }
            Recipe::Transpose(inner) => self.need(inner, dims.map(turned).as_deref(), range),
            Recipe::Rows(inner, _, to) => self.need(inner, dims.map(|d| with(d, 0, *to)).as_deref(), range),
            Recipe::Narrow(inner, axis, _, to) => {
                self.need(inner, dims.map(|d| with(d, *axis, *to)).as_deref(), range);
            }
            Recipe::Every(inner, axis, start, step) => {
                let whole = |d: &[usize]| {
                    let n = d.get(*axis).copied().unwrap_or(1).saturating_mul(*step);
                    with(d, *axis, n.max(start.saturating_add(1)))
                };
                self.need(inner, dims.map(whole).as_deref(), range);
            }
            Recipe::Reshape(inner, into) => match &**inner {
                Recipe::Stored(name) => self.put(name, Some(into), range, true),
                Recipe::Rows(_, from, to) if from < to => {
                    let count = into.iter().fold(1usize, |n, &d| n.saturating_mul(d));
                    let rows = to - from;
                    let dims = if into.first() == Some(&rows) { into.clone() } else { vec![rows, count / rows] };
                    self.need(inner, Some(&dims), range);
                }
                _ => self.need(inner, Some(into), range),
            },
            Recipe::Stack(parts) => {
                let one = dims.and_then(|d| d.get(1..));
                parts.iter().for_each(|part| self.need(part, one, range));
            }
            Recipe::Join(parts, axis) => {
                let lengths: Vec<_> = parts.iter().map(|part| length(part, *axis)).collect();
                let open = lengths.iter().filter(|l| l.is_none()).count().max(1);
                let told: usize = lengths.iter().flatten().fold(0, |n, &l| n.saturating_add(l));
                let rest = dims.and_then(|d| d.get(*axis)).map_or(0, |&d| d.saturating_sub(told)) / open;
                for (part, length) in parts.iter().zip(lengths) {
                    let dims = dims.map(|d| with(d, *axis, length.unwrap_or(rest)));
                    self.need(part, dims.as_deref(), range);
                }
            }
        }
    }

    fn put(&mut self, name: &str, dims: Option<&[usize]>, (center, width): (f32, f32), loose: bool) {
        let made =
            Made { shape: dims.unwrap_or(&[1]).to_vec(), center, width, loose: loose || dims.is_none(), ids: false };
        match self.0.get_mut(name) {
            None => drop(self.0.insert(name.to_owned(), made)),
            // Several slots may each take a part of it.
            Some(there) if !made.loose && there.shape.len() == made.shape.len() && !there.loose => {
                there.shape.iter_mut().zip(made.shape).for_each(|(a, b)| *a = b.max(*a));
            }
            Some(there) if there.loose && !made.loose => *there = made,
            Some(_) => {}
        }
    }

    /// Numbers in all tensors together.
    pub fn numbers(&self) -> usize {
        let count = |made: &Made| made.shape.iter().fold(1usize, |n, &d| n.saturating_mul(d));
        self.0.values().map(count).fold(0, usize::saturating_add)
    }

    /// The names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// The checkpoint itself.
    pub fn checkpoint(&self, fill: Fill, seed: u64) -> Outcome<Checkpoint> {
        if self.numbers() > MOST_NUMBERS {
            return Err(Stop::fail(format!(
                "it has {} parameters; an example for checking should have fewer than {MOST_NUMBERS}: take fewer and narrower layers",
                self.numbers()
            )));
        }
        let file: Arc<Path> = Path::new("synthetic").into();
        let mut checkpoint = Checkpoint::default();
        for (name, made) in &self.0 {
            let count = made.shape.iter().product::<usize>();
            let put = |checkpoint: &mut Checkpoint, name: String, dtype, shape: Vec<usize>, bytes: Vec<u8>| {
                Stored::new(dtype, shape, bytes.into(), file.clone()).and_then(|stored| checkpoint.insert(name, stored))
            };
            if made.ids {
                // Of two things there are two at least.
                let ids = (0..count as u64).map(|index| super::steps::mix(seed ^ index) & 1);
                let bytes = ids.flat_map(u64::to_le_bytes).collect();
                put(&mut checkpoint, name.clone(), Dtype::I64, made.shape.clone(), bytes)?;
                continue;
            }
            let mut numbers = match fill {
                Fill::Zeros => {
                    put(&mut checkpoint, name.clone(), Dtype::F32, made.shape.clone(), vec![0; 4 * count])?;
                    continue;
                }
                _ => made.numbers(seed, name, count),
            };
            let cols = made.shape.last().copied().unwrap_or(1);
            if matches!(fill, Fill::Packed | Fill::Unpacked)
                && let Some(path) = name.strip_suffix(".weight").filter(|path| packs(path, &made.shape))
            {
                let rows = count / cols;
                let format = Format::Affine { bits: 4, group: GROUP, scales: Float::F32 };
                let matrix = Matrix::quantize(&numbers, rows, cols, format)?;
                if fill == Fill::Packed {
                    let [words, scales, biases] = matrix.parts();
                    let parts = [
                        ("weight", Dtype::U32, cols / 8, words),
                        ("scales", Dtype::F32, cols / GROUP, scales),
                        ("biases", Dtype::F32, cols / GROUP, biases),
                    ];
                    for (part, dtype, last, bytes) in parts {
                        let shape = with(&made.shape, made.shape.len() - 1, last);
                        put(&mut checkpoint, format!("{path}.{part}"), dtype, shape, bytes.to_vec())?;
                    }
                    continue;
                }
                matrix.dequantize_rows(0..rows, &mut numbers);
            }
            let bytes = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
            put(&mut checkpoint, name.clone(), Dtype::F32, made.shape.clone(), bytes)?;
        }
        Ok(checkpoint)
    }
}

impl Made {
    /// Fowler-Noll-Vo 1a of the name, then Steele, Lea and Flood's generator (2014) along the index.
    fn numbers(&self, seed: u64, name: &str, count: usize) -> Vec<f32> {
        const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
        let start = name.bytes().fold(0xcbf2_9ce4_8422_2325 ^ seed.wrapping_mul(GOLDEN), |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        });
        let number = |index: u64| {
            let bits = super::steps::mix(start.wrapping_add(index.wrapping_mul(GOLDEN))) >> 40;
            self.center + self.width * (bits as f32 / 8_388_608.0 - 1.0)
        };
        (0..count as u64).map(number).collect()
    }
}

/// Whether a tool would pack this weight: a matrix, or a stack of them, of whole groups.
fn packs(path: &str, shape: &[usize]) -> bool {
    let leaf = path.rsplit('.').next().unwrap_or(path).to_lowercase();
    let is_other = leaf.contains("norm") || leaf.contains("conv") || leaf == "ln" || leaf.starts_with("ln_");
    let is_matrix = shape.len() == 2 || shape.len() == 3 && !shape[1..].contains(&1);
    !is_other && is_matrix && shape.last().is_some_and(|cols| *cols > 0 && cols.is_multiple_of(GROUP))
}

fn with(dims: &[usize], axis: usize, length: usize) -> Vec<usize> {
    let mut dims = dims.to_vec();
    if let Some(dim) = dims.get_mut(axis) {
        *dim = length;
    }
    dims
}

fn turned(dims: &[usize]) -> Vec<usize> {
    let (mut dims, n) = (dims.to_vec(), dims.len());
    if n > 1 {
        dims.swap(n - 1, n - 2);
    }
    dims
}

/// The shape that a recipe has whatever is stored.
fn given(recipe: &Recipe) -> Option<Vec<usize>> {
    match recipe {
        Recipe::Reshape(_, dims) => Some(dims.clone()),
        Recipe::Numbers(numbers) => Some(vec![numbers.len()]),
        Recipe::Affine(inner, ..) | Recipe::UnitRows(inner, _) => given(inner),
        Recipe::Transpose(inner) => given(inner).as_deref().map(turned),
        Recipe::Rows(inner, from, to) => given(inner).map(|d| with(&d, 0, to.saturating_sub(*from))),
        Recipe::Narrow(inner, axis, from, to) => given(inner).map(|d| with(&d, *axis, to.saturating_sub(*from))),
        Recipe::Every(inner, axis, start, step) => {
            let inner = given(inner)?;
            let whole = inner.get(*axis)?.saturating_sub(*start);
            Some(with(&inner, *axis, whole.div_ceil((*step).max(1))))
        }
        Recipe::Stored(_) | Recipe::Stack(_) | Recipe::Join(..) => None,
    }
}

/// How long a recipe is along one axis, where it says so itself.
fn length(recipe: &Recipe, axis: usize) -> Option<usize> {
    match recipe {
        Recipe::Rows(_, from, to) if axis == 0 => Some(to.saturating_sub(*from)),
        Recipe::Narrow(_, cut, from, to) if *cut == axis => Some(to.saturating_sub(*from)),
        Recipe::Affine(inner, ..) | Recipe::UnitRows(inner, _) => length(inner, axis),
        other => given(other).and_then(|dims| dims.get(axis).copied()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(name: &str) -> Arc<Recipe> {
        Arc::new(Recipe::Stored(name.into()))
    }

    fn needed(recipes: &[(Recipe, &[usize])]) -> Demand {
        let mut demand = Demand::default();
        recipes.iter().for_each(|(recipe, dims)| demand.need(recipe, Some(dims), (1.0, 0.5)));
        demand
    }

    fn shape<'a>(demand: &'a Demand, name: &str) -> &'a [usize] {
        &demand.0[name].shape
    }

    #[test]
    fn a_fused_tensor_is_as_long_as_the_last_part_of_it_that_somebody_takes() {
        let rows = |from, to| Recipe::Rows(stored("qkv"), from, to);
        assert_eq!(shape(&needed(&[(rows(0, 8), &[8, 5]), (rows(8, 12), &[4, 5])]), "qkv"), [12, 5]);
        let halves = [0, 1].map(|half| (Recipe::Every(stored("gate_up"), 0, half, 2), &[6usize, 5][..]));
        assert_eq!(shape(&needed(&halves), "gate_up"), [12, 5]);
        let lanes = Recipe::Narrow(Arc::new(Recipe::Transpose(stored("conv1d"))), 0, 3, 7);
        assert_eq!(shape(&needed(&[(lanes, &[4, 5])]), "conv1d"), [5, 7]);
    }

    #[test]
    fn what_is_put_together_is_taken_apart() {
        let stack = Recipe::Stack(vec![stored("a"), stored("b")]);
        let demand = needed(&[(stack, &[2, 3, 4])]);
        assert_eq!((shape(&demand, "a"), shape(&demand, "b")), (&[3, 4][..], &[3, 4][..]));
        let join = Recipe::Join(vec![Arc::new(Recipe::Rows(stored("a"), 2, 4)), stored("b")], 0);
        let demand = needed(&[(join, &[7, 3])]);
        assert_eq!((shape(&demand, "a"), shape(&demand, "b")), (&[4, 3][..], &[5, 3][..]));
    }

    #[test]
    fn a_reshape_tells_only_how_many_numbers_there_are_where_nobody_tells_more() {
        let reshape = || Recipe::Reshape(stored("w"), vec![2, 3, 4]);
        assert_eq!(shape(&needed(&[(reshape(), &[2, 3, 4])]), "w"), [2, 3, 4]);
        let plain = Recipe::Stored("w".into());
        assert_eq!(shape(&needed(&[(reshape(), &[2, 3, 4]), (plain, &[6, 4])]), "w"), [6, 4]);
    }

    #[test]
    fn numbers_lie_where_the_transforms_want_them_and_follow_from_seed_and_name() {
        // A norm that stores w - 1, halved.
        let demand = needed(&[(Recipe::Affine(stored("norm"), 2.0, 1.0), &[1000])]);
        let made = &demand.0["norm"];
        assert_eq!((made.center, made.width), (0.0, 0.25));
        let numbers = made.numbers(1, "norm", 1000);
        assert!(numbers.iter().all(|x| x.abs() <= 0.25));
        assert!((numbers.iter().sum::<f32>() / 1000.0).abs() < 0.02);
        assert_eq!(numbers, made.numbers(1, "norm", 1000));
        assert_ne!(numbers, made.numbers(2, "norm", 1000));
        assert_ne!(numbers, made.numbers(1, "other", 1000));
    }
}
