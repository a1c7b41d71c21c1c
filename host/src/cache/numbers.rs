//! The numbers of a recurrence's state, where the last step left them: on the CPU, or on the GPU whose kernel wrote them. Those on a GPU are
//! never written again, so that a copy of them costs nothing; but on CUDA there are two places that the steps of one sequence write in turn.

use candle_core::{DType, Device, Result, Tensor};
use std::{borrow::Cow, sync::Arc};

/// Always f32.
#[derive(Clone, Debug)]
pub enum Numbers {
    /// On the CPU.
    Here(Vec<f32>),
    /// On a device, in the state's shape.
    There(Tensor),
    /// On a device in one half of a tensor `[2, count]`, the one at the lowest bit of the tokens read. The next step writes the other half, so
    /// that a recorded step finds its state where it was; nobody writes while there is another owner.
    InTurn(Arc<Tensor>, usize),
}

impl Numbers {
    /// So many zeros.
    pub fn zeros(count: usize) -> Self {
        Numbers::Here(vec![0.0; count])
    }

    /// How many they are.
    pub fn count(&self) -> usize {
        match self {
            Numbers::Here(numbers) => numbers.len(),
            Numbers::There(tensor) => tensor.elem_count(),
            Numbers::InTurn(both, _) => both.elem_count() / 2,
        }
    }

    /// The half that holds them, if they lie so.
    fn half(&self) -> Result<Option<Tensor>> {
        match self {
            Numbers::InTurn(both, half) => Ok(Some(both.narrow(0, *half, 1)?)),
            _ => Ok(None),
        }
    }

    /// The same numbers, to be kept while steps go on.
    pub fn copied(&self) -> Result<Self> {
        Ok(match self.half()? {
            Some(half) => Numbers::There(half.copy()?),
            None => self.clone(),
        })
    }

    /// Both halves of a place of their own on `device`, for a step whose first token stands at `offset`.
    pub fn in_turn(&mut self, device: &Device, offset: usize) -> Result<Tensor> {
        let at = offset & 1;
        if let Numbers::InTurn(both, half) = self
            && *half == at
            && let Some(alone) = Arc::get_mut(both)
        {
            return Ok(alone.clone());
        }
        let count = self.count();
        let both = Tensor::zeros((2, count), DType::F32, device)?;
        if !matches!(self, Numbers::Here(numbers) if numbers.iter().all(|&x| x == 0.0)) {
            both.slice_set(&self.on(device, &[1, count])?.contiguous()?, 0, at)?;
        }
        *self = Numbers::InTurn(Arc::new(both.clone()), at);
        Ok(both)
    }

    /// Both halves, if they lie so.
    pub fn place(&self) -> Option<&Tensor> {
        if let Numbers::InTurn(both, _) = self { Some(both) } else { None }
    }

    /// Which half holds them.
    pub fn turn(&self) -> usize {
        if let Numbers::InTurn(_, half) = self { *half } else { 0 }
    }

    /// A step has written them, and `read` tokens have been read now.
    pub fn turned(&mut self, read: usize) {
        if let Numbers::InTurn(_, half) = self {
            *half = read & 1;
        }
    }

    /// On the CPU from now on.
    pub fn here(&mut self) -> Result<&mut Vec<f32>> {
        if !matches!(self, Numbers::Here(_)) {
            *self = Numbers::Here(self.read()?.into_owned());
        }
        match self {
            Numbers::Here(numbers) => Ok(numbers),
            _ => candle_core::bail!("a state did not come to the cpu"),
        }
    }

    /// As they are, to be read on the CPU.
    pub fn read(&self) -> Result<Cow<'_, [f32]>> {
        Ok(match self {
            Numbers::Here(numbers) => Cow::Borrowed(numbers),
            Numbers::There(tensor) => Cow::Owned(tensor.flatten_all()?.to_vec1()?),
            Numbers::InTurn(both, half) => Cow::Owned(both.get(*half)?.to_vec1()?),
        })
    }

    /// As a tensor on a device.
    pub fn on(&self, device: &Device, dims: &[usize]) -> Result<Tensor> {
        match self {
            Numbers::Here(numbers) => Tensor::from_slice(numbers, dims, device),
            Numbers::There(tensor) => tensor.to_device(device)?.reshape(dims),
            Numbers::InTurn(both, half) => both.get(*half)?.to_device(device)?.reshape(dims),
        }
    }
}

impl PartialEq for Numbers {
    fn eq(&self, other: &Self) -> bool {
        matches!((self.read(), other.read()), (Ok(a), Ok(b)) if a == b)
    }
}

impl From<Vec<f32>> for Numbers {
    fn from(numbers: Vec<f32>) -> Self {
        Numbers::Here(numbers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_turn_move_from_half_to_half_and_leave_a_copy_alone() {
        let mut numbers = Numbers::from(vec![1.0, 2.0]);
        let both = numbers.in_turn(&Device::Cpu, 3).unwrap();
        assert_eq!(both.to_vec2::<f32>().unwrap(), [[0.0, 0.0], [1.0, 2.0]]);
        let (kept, shared) = (numbers.copied().unwrap(), numbers.clone());
        // Somebody else has them now, so that a step gets a place of its own.
        let fresh = numbers.in_turn(&Device::Cpu, 3).unwrap();
        fresh.slice_set(&Tensor::new(&[[7f32, 8.0]], &Device::Cpu).unwrap(), 0, 0).unwrap();
        numbers.turned(4);
        assert_eq!(numbers.read().unwrap().as_ref(), [7.0, 8.0]);
        assert_eq!((kept, shared), (vec![1.0, 2.0].into(), vec![1.0, 2.0].into()));
        let again = numbers.in_turn(&Device::Cpu, 4).unwrap();
        assert_eq!(again.to_vec2::<f32>().unwrap(), [[7.0, 8.0], [1.0, 2.0]]);
        assert_eq!(numbers.here().unwrap(), &[7.0, 8.0]);
    }

    #[test]
    fn numbers_are_the_same_wherever_they_lie() {
        let mut there = Numbers::There(Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu).unwrap());
        assert_eq!((there.count(), there.read().unwrap().as_ref()), (4, &[1.0, 2.0, 3.0, 4.0][..]));
        let copy = there.clone();
        there.here().unwrap()[0] = 9.0;
        assert_eq!(there.on(&Device::Cpu, &[4]).unwrap().to_vec1::<f32>().unwrap(), [9.0, 2.0, 3.0, 4.0]);
        assert_eq!(copy.on(&Device::Cpu, &[1, 4]).unwrap().to_vec2::<f32>().unwrap(), [[1.0, 2.0, 3.0, 4.0]]);
    }
}
