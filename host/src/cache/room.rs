//! Rows of keys or values in a tensor with room for more: new ones are written behind the last, so nothing is copied from step to step and
//! the address stays, which recorded steps rely on.
//!
//! Writing in place is seen through every handle of a tensor. Copies of a room share its tensor only until one of them writes.

use candle_core::{Result, Tensor};
use std::sync::Arc;

/// Rows are added in blocks of at least so many.
const BLOCK: usize = 256;

/// The rows.
#[derive(Clone, Default)]
pub struct Room {
    whole: Option<Arc<Tensor>>,
    len: usize,
}

impl Room {
    /// Room for `rows` `[entries, heads, dim]`, which it holds.
    pub fn holding(rows: &Tensor) -> Result<Self> {
        let mut room = Room::default();
        room.extend(rows)?;
        Ok(room)
    }

    /// All there is room for, `[capacity, heads, dim]`; what lies behind the rows is not to be read.
    pub fn whole(&self) -> Option<&Tensor> {
        self.whole.as_deref()
    }

    /// The rows, in place.
    pub fn rows(&self) -> Result<Option<Tensor>> {
        self.whole.as_ref().filter(|_| self.len > 0).map(|whole| whole.narrow(0, 0, self.len)).transpose()
    }

    /// How many rows.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Makes sure that `more` rows shaped like those of `like` fit behind the rows, in a tensor that nobody else writes.
    pub fn reserve(&mut self, like: &Tensor, more: usize) -> Result<()> {
        let needed = self.len + more;
        if let Some(whole) = &mut self.whole
            && whole.dim(0)? >= needed
            && Arc::get_mut(whole).is_some()
        {
            return Ok(());
        }
        let capacity = (needed + (needed / 4).max(BLOCK)).next_multiple_of(BLOCK);
        let mut dims = like.dims().to_vec();
        if let Some(first) = dims.first_mut() {
            *first = capacity;
        }
        let whole = Tensor::zeros(dims, like.dtype(), like.device())?;
        if let Some(rows) = self.rows()? {
            whole.slice_set(&rows, 0, 0)?;
        }
        self.whole = Some(Arc::new(whole));
        Ok(())
    }

    /// Appends `[rows, heads, dim]`.
    pub fn extend(&mut self, rows: &Tensor) -> Result<()> {
        let more = rows.dim(0)?;
        self.reserve(rows, more)?;
        if let Some(whole) = &self.whole {
            whole.slice_set(&rows.contiguous()?, 0, self.len)?;
        }
        self.len += more;
        Ok(())
    }

    /// Counts rows that were written into [`Self::whole`] behind the others.
    pub fn grown(&mut self, more: usize) {
        self.len += more;
    }

    /// Drops rows `from..to`.
    pub fn remove(&mut self, from: usize, to: usize) -> Result<()> {
        let behind = match self.rows()? {
            Some(rows) if to < self.len => Some(rows.narrow(0, to, self.len - to)?.force_contiguous()?),
            _ => None,
        };
        self.len = from.min(self.len);
        behind.map_or(Ok(()), |rows| self.extend(&rows))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::slices::with_f32;
    use candle_core::Device;

    fn rows(numbers: impl Iterator<Item = usize>) -> Tensor {
        let numbers: Vec<f32> = numbers.map(|n| n as f32).collect();
        let count = numbers.len();
        Tensor::from_vec(numbers, (count, 1, 1), &Device::Cpu).unwrap()
    }

    fn read(room: &Room) -> Vec<f32> {
        room.rows().unwrap().map_or(Vec::new(), |t| t.flatten_all().unwrap().to_vec1().unwrap())
    }

    #[test]
    fn what_is_written_into_a_copy_is_not_seen_in_the_original() {
        let mut room = Room::holding(&rows(0..3)).unwrap();
        let mut copy = room.clone();
        copy.remove(2, 3).unwrap();
        copy.extend(&rows(7..9)).unwrap();
        room.extend(&rows(3..4)).unwrap();
        assert_eq!((read(&room), read(&copy)), (vec![0.0, 1.0, 2.0, 3.0], vec![0.0, 1.0, 7.0, 8.0]));
    }

    #[test]
    fn rows_keep_their_place_until_there_is_no_room_left() {
        let mut room = Room::holding(&rows(0..1)).unwrap();
        let capacity = room.whole().unwrap().dim(0).unwrap();
        let address = |room: &Room| with_f32(room.whole().unwrap(), |numbers| numbers.as_ptr()).unwrap();
        let first = address(&room);
        for n in 1..capacity {
            room.extend(&rows(n..n + 1)).unwrap();
        }
        assert_eq!(address(&room), first);
        room.extend(&rows(capacity..capacity + 1)).unwrap();
        assert_ne!(address(&room), first);
        assert_eq!(read(&room), (0..=capacity).map(|n| n as f32).collect::<Vec<_>>());
    }

    #[test]
    fn rows_leave_from_everywhere() {
        for (from, to, left) in [(0, 2, vec![2.0, 3.0, 4.0]), (1, 3, vec![0.0, 3.0, 4.0]), (3, 5, vec![0.0, 1.0, 2.0])]
        {
            let mut room = Room::holding(&rows(0..5)).unwrap();
            room.remove(from, to).unwrap();
            assert_eq!(read(&room), left, "{from}..{to}");
        }
        let mut none = Room::holding(&rows(0..5)).unwrap();
        none.remove(0, 5).unwrap();
        assert!(none.is_empty() && read(&none).is_empty());
    }
}
