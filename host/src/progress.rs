//! Progress of long work, on a terminal and nowhere else.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, stderr};

/// A bar that counts steps of `what`; silent unless `wanted` and standard error is a terminal.
pub fn bar(wanted: bool, what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(0).with_message(what);
    if !wanted || !stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    bar.with_style(
        ProgressStyle::with_template("{msg:>12} {wide_bar} {pos}/{len}")
            .unwrap_or_else(|_| ProgressStyle::default_bar()),
    )
}
