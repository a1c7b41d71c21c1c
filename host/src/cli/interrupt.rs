//! Ctrl-C ends a generation politely, once: what was generated stays and its statistics are printed. A second one ends the process, and
//! so does the first while no generation is watched.

use std::sync::{
    Once,
    atomic::{AtomicBool, Ordering},
};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
static WATCHED: AtomicBool = AtomicBool::new(false);

/// From now on Ctrl-C sets the returned flag instead of ending the process.
pub fn watch() -> &'static AtomicBool {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(|| {
        // Without a handler Ctrl-C ends the process as usual, which is no reason to refuse work.
        let _ = ctrlc::set_handler(|| {
            if INTERRUPTED.swap(true, Ordering::Relaxed) || !WATCHED.load(Ordering::Relaxed) {
                std::process::exit(130);
            }
        });
    });
    INTERRUPTED.store(false, Ordering::Relaxed);
    WATCHED.store(true, Ordering::Relaxed);
    &INTERRUPTED
}

/// From now on Ctrl-C ends the process again, until the next `watch`.
pub fn release() {
    WATCHED.store(false, Ordering::Relaxed);
}
