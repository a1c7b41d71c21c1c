//! One model on several devices of a host, tensor parallel: every rank runs the plugin's `forward` itself, on its share of the weights and
//! with its own heads in its own caches, and where a share has to become whole the ranks add up what they have.
//!
//! Nothing of it is in a plugin: `trace` writes down what a dry run asks for, `shares` tells from that what can be cut (in `classes` of axes
//! that are cut alike), `cut` turns it into what each rank wants of the checkpoint, `ranks` keeps a thread a rank in step, and in `group`
//! they meet.

pub mod classes;
pub mod cut;
pub mod group;
#[cfg(feature = "cuda")]
mod nccl;
pub mod ranks;
pub mod shares;
pub mod trace;
