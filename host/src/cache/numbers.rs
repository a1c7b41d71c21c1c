//! The numbers of a recurrence's state, where the last step left them: on the CPU, or on the GPU whose kernel wrote them. Those on a GPU are
//! never written again, so that a copy of them costs nothing.

use candle_core::{Device, Result, Tensor};
use std::borrow::Cow;

/// Always f32.
#[derive(Clone, Debug)]
pub enum Numbers {
    /// On the CPU.
    Here(Vec<f32>),
    /// On a device, in the state's shape.
    There(Tensor),
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
        }
    }

    /// On the CPU from now on.
    pub fn here(&mut self) -> Result<&mut Vec<f32>> {
        if let Numbers::There(tensor) = self {
            *self = Numbers::Here(tensor.flatten_all()?.to_vec1()?);
        }
        match self {
            Numbers::Here(numbers) => Ok(numbers),
            Numbers::There(_) => candle_core::bail!("a state did not come to the cpu"),
        }
    }

    /// As they are, to be read on the CPU.
    pub fn read(&self) -> Result<Cow<'_, [f32]>> {
        Ok(match self {
            Numbers::Here(numbers) => Cow::Borrowed(numbers),
            Numbers::There(tensor) => Cow::Owned(tensor.flatten_all()?.to_vec1()?),
        })
    }

    /// As a tensor on a device.
    pub fn on(&self, device: &Device, dims: &[usize]) -> Result<Tensor> {
        match self {
            Numbers::Here(numbers) => Tensor::from_slice(numbers, dims, device),
            Numbers::There(tensor) => tensor.to_device(device)?.reshape(dims),
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
    fn numbers_are_the_same_wherever_they_lie() {
        let mut there = Numbers::There(Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu).unwrap());
        assert_eq!((there.count(), there.read().unwrap().as_ref()), (4, &[1.0, 2.0, 3.0, 4.0][..]));
        let copy = there.clone();
        there.here().unwrap()[0] = 9.0;
        assert_eq!(there.on(&Device::Cpu, &[4]).unwrap().to_vec1::<f32>().unwrap(), [9.0, 2.0, 3.0, 4.0]);
        assert_eq!(copy.on(&Device::Cpu, &[1, 4]).unwrap().to_vec2::<f32>().unwrap(), [[1.0, 2.0, 3.0, 4.0]]);
    }
}
