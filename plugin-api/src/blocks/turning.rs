//! What positions do to queries and keys beside the plain rope.

use crate::{Layer, Rope, Tensor};

/// q `[tokens, heads, head_dim]` times `1 + beta · ln(1 + ⌊position / span⌋)`.
#[track_caller]
pub(super) fn grown(q: Tensor, growth: Option<(f32, f32)>, layer: &Layer) -> Tensor {
    let Some((beta, span)) = growth else { return q };
    // [tokens, 1, 1], to meet [tokens, heads, head_dim].
    let positions = layer.positions().unflatten(1).transpose().unflatten(1);
    q * (((positions / span).floor() + 1.0).log() * beta + 1.0)
}

/// x `[tokens, heads, head_dim]` turned, if there is a rope; where `reversed` names the lanes of a head, by minus each angle.
///
/// (a, -b) turned by an angle is (a, b) turned by minus that angle, but for the sign of the second half, which stays wrong here: neither
/// q·k nor an RMS norm of both can see it.
#[track_caller]
pub(super) fn turned(x: Tensor, rope: Option<&Rope>, reversed: Option<usize>, layer: &mut Layer) -> Tensor {
    let Some(rope) = rope else { return x };
    let Some(head_dim) = reversed else { return layer.rotate(rope, x) };
    let half = head_dim / 2;
    layer.rotate(rope, Tensor::concat(&[&x.narrow(0, half), &-x.narrow(half, half)]))
}
