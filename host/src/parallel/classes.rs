//! Axes that are cut alike: a class of them is cut into so many atoms, which no rank may divide further (whole heads, whole groups of
//! packed weights). Two axes that meet in an op become one class, whose atoms are those that both allow. A class with fewer atoms than
//! there are ranks is not cut at all.

use std::ops::Range;

/// A class by its number, which may have been joined to another since.
pub type Class = usize;

/// All classes of a model.
#[derive(Debug, Default)]
pub struct Classes {
    joined_to: Vec<Class>,
    atoms: Vec<usize>,
}

impl Classes {
    /// A new one of so many atoms.
    pub fn of(&mut self, atoms: usize) -> Class {
        self.joined_to.push(self.atoms.len());
        self.atoms.push(atoms.max(1));
        self.atoms.len() - 1
    }

    fn root(&self, mut class: Class) -> Class {
        while let Some(&to) = self.joined_to.get(class).filter(|&&to| to != class) {
            class = to;
        }
        class
    }

    /// How many atoms the class has.
    pub fn atoms(&self, class: Class) -> usize {
        self.atoms.get(self.root(class)).copied().unwrap_or(1)
    }

    /// Lets cuts fall only where `parts` equal parts meet, too.
    pub fn restrict(&mut self, class: Class, parts: usize) {
        let root = self.root(class);
        if let Some(atoms) = self.atoms.get_mut(root) {
            *atoms = common(*atoms, parts.max(1));
        }
    }

    /// Makes two one.
    pub fn join(&mut self, a: Class, b: Class) {
        let (a, b) = (self.root(a), self.root(b));
        if a != b {
            let atoms = self.atoms(b);
            if let Some(to) = self.joined_to.get_mut(b) {
                *to = a;
            }
            self.restrict(a, atoms);
        }
    }
}

/// The greatest common divisor.
fn common(a: usize, b: usize) -> usize {
    if b == 0 { a } else { common(b, a % b) }
}

/// A rank's part of an axis of `len` that is cut into `atoms`. Ranks get the same wherever that can be, otherwise parts that differ by an
/// atom; atoms are joined to larger ones as long as that changes little, since kernels like long runs.
pub fn part(len: usize, atoms: usize, rank: usize, ranks: usize) -> Range<usize> {
    let (mut atoms, ranks) = (atoms.max(1), ranks.max(1));
    let keeps =
        |fewer: usize| if atoms.is_multiple_of(ranks) { fewer.is_multiple_of(ranks) } else { fewer >= 32 * ranks };
    let mut fewer = atoms;
    while fewer.is_multiple_of(2) && keeps(fewer / 2) {
        fewer /= 2;
    }
    atoms = fewer;
    let at = |rank: usize| rank * atoms / ranks * (len / atoms);
    at(rank)..at(rank + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_follow_each_other_fall_on_atoms_and_differ_by_one_at_most() {
        for (len, atoms, ranks) in
            [(14336, 14336, 2), (14336, 14336, 3), (96, 6, 4), (128, 8, 3), (7, 7, 7), (40 * 80, 40, 16)]
        {
            let parts: Vec<_> = (0..ranks).map(|rank| part(len, atoms, rank, ranks)).collect();
            assert_eq!((parts[0].start, parts[ranks - 1].end), (0, len));
            assert!(parts.windows(2).all(|two| two[0].end == two[1].start), "{parts:?}");
            assert!(parts.iter().all(|p| !p.is_empty() && p.start % (len / atoms) == 0), "{parts:?}");
            let lens = || parts.iter().map(|p| p.len());
            let even = lens().max().unwrap() - lens().min().unwrap();
            assert!(even <= (len / atoms).max(len / (32 * ranks)), "{parts:?}");
        }
        assert_eq!(part(14336, 14336, 1, 2), 7168..14336);
    }

    #[test]
    fn classes_that_meet_allow_only_the_cuts_of_both() {
        let mut classes = Classes::default();
        let (q, k, other) = (classes.of(32), classes.of(8), classes.of(12));
        classes.join(q, k);
        assert_eq!((classes.atoms(q), classes.atoms(k)), (8, 8));
        classes.join(other, q);
        assert_eq!((classes.atoms(q), classes.atoms(k)), (4, 4));
        classes.restrict(k, 1);
        assert_eq!((classes.atoms(q), classes.atoms(other)), (1, 1));
    }
}
