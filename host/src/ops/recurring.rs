//! The running ops that carry a state from token to token: convolutions and recurrences. Each reads a layer's state per sequence, walks
//! through the sequence's new tokens and leaves the state after the last one.

use super::{
    running::Running,
    value::{Outcome, fault},
};
use plugin_api::abi::{Handle, Slot};

macro_rules! not_yet {
    ($($name:ident($($arg:ident: $ty:ty),*);)*) => {
        impl Running<'_> {
            $(pub fn $name(&mut self, $($arg: $ty),*) -> Outcome {
                $(let _ = $arg;)*
                Err(fault!("this dylm does not have the op yet"))
            })*
        }
    };
}

not_yet! {
    conv1d(slot: Slot, cache: u32, x: Handle);
    shift(cache: u32, x: Handle);
    ssd(cache: u32, inputs: [Handle; 5]);
    selective_scan(cache: u32, inputs: [Handle; 5]);
    gated_delta(cache: u32, inputs: [Handle; 5]);
    linear_attention(cache: u32, inputs: [Handle; 4]);
    wkv7(cache: u32, inputs: [Handle; 6]);
    rg_lru(cache: u32, inputs: [Handle; 2]);
}
