//! What the host does for a plugin: the op table, and behind each entry a check of shapes and then the numbers.
//!
//! `table` is the ABI face, `call` what happens around every op, `lending` whose call it is; `building` (with `experts`) runs while a plugin
//! names its weights, `running`, `attending` and `recurring` (with `linear_attention`, `pooling`, a plugin's own step in `scanning`, its
//! own ops in `own_op`) while it computes. `arena` turns handles into values; `value` has the ops that need neither weights nor sequence;
//! `watch` writes down what a plugin called, `noting` so that the host can
//! do it again; `last_rows` spares a prompt what only its other tokens would need.

pub(crate) mod arena;
pub(crate) mod attending;
pub(crate) mod building;
mod by_team;
pub(crate) mod call;
mod experts;
#[cfg(feature = "cuda")]
mod fusing;
pub(crate) mod last_rows;
#[cfg(feature = "cuda")]
pub(crate) mod later;
pub(crate) mod lending;
mod linear_attention;
mod ngrams;
pub(crate) mod noting;
pub(crate) mod own_op;
mod pooling;
pub(crate) mod recurring;
mod recurring_away;
#[cfg(feature = "cuda")]
mod recurring_cuda;
pub(crate) mod running;
mod scanning;
pub(crate) mod table;
pub(crate) mod value;
pub(crate) mod watch;
