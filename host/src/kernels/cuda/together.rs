//! Linear layers that are given the same input, as a plugin's `linears` declares them, in one launch: whichever is asked for first computes
//! all of them, and the others find their output there. An input is known by its tensor's id.

use super::{
    packed::Tiles,
    product::{Product, outputs},
};
use crate::layers::{Layer, weight::Weight};
use candle_core::{Result, Tensor, TensorId};
use plugin_api::abi::Slot;
use std::sync::{Arc, Mutex, PoisonError};

/// Most matrices that a launch takes.
const MOST: usize = 3;

/// Matrices of one input.
pub struct Together {
    members: Vec<(Tiles, Option<Tensor>)>,
    ready: Mutex<Option<Ready>>,
}

struct Ready {
    of: TensorId,
    outputs: Vec<Option<Tensor>>,
}

impl Together {
    /// With their biases.
    pub fn matrices(&self) -> Vec<(&Tiles, Option<&Tensor>)> {
        self.members.iter().map(|(tiles, bias)| (tiles, bias.as_ref())).collect()
    }

    /// What the members write for x.
    pub fn outputs(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        let tiles: Vec<&Tiles> = self.members.iter().map(|(tiles, _)| tiles).collect();
        outputs(&tiles, x)
    }

    /// The output of a member for x `[.., cols]`.
    pub fn output(&self, x: &Tensor, place: usize) -> Result<Tensor> {
        let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ready) = ready.as_mut().filter(|ready| ready.of == x.id())
            && let Some(output) = ready.outputs.get_mut(place).and_then(Option::take)
        {
            return Ok(output);
        }
        let y = self.outputs(x)?;
        let matrices = self.matrices();
        Product { matrices: &matrices, x, y: &y, norm: None, residual: None, squares: None }.run()?;
        let mut outputs: Vec<_> = y.into_iter().map(Some).collect();
        let Some(output) = outputs.get_mut(place).and_then(Option::take) else {
            candle_core::bail!("matrix {place} of {}", matrices.len())
        };
        *ready = Some(Ready { of: x.id(), outputs });
        Ok(output)
    }
}

/// Joins layers that may run as one and can.
pub fn join(layers: &mut [Layer], groups: &[Vec<Slot>]) {
    for group in groups.iter().filter(|group| (2..=MOST).contains(&group.len())) {
        let members: Vec<_> = group
            .iter()
            .filter_map(|slot| match layers.get(slot.0 as usize)? {
                Layer::Linear(linear) if linear.adapter.is_none() => match &linear.weight {
                    Weight::Tiles(tiles) if tiles.together.is_none() => Some((tiles.clone(), linear.bias.clone())),
                    _ => None,
                },
                _ => None,
            })
            .collect();
        let alike = |(a, _): &(Tiles, _), (b, _): &(Tiles, _)| a.layout == b.layout && a.cols == b.cols;
        if members.len() != group.len() || !members.iter().all(|m| alike(m, &members[0])) {
            continue;
        }
        let together = Arc::new(Together { members, ready: Mutex::new(None) });
        for (place, slot) in group.iter().enumerate() {
            if let Some(Layer::Linear(linear)) = layers.get_mut(slot.0 as usize)
                && let Weight::Tiles(tiles) = &mut linear.weight
            {
                tiles.together = Some((together.clone(), place));
            }
        }
    }
}
