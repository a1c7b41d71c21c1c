//! Ctrl-C ends a generation politely, once: what was generated stays and its statistics are printed. A second one ends the process, and
//! so does the first while no generation is watched. What comes within half a second is one Ctrl-C: programs that stop others (timeout,
//! a shell's job control) signal the process and then its whole group.

use std::{
    sync::{
        Once,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
static WATCHED: AtomicBool = AtomicBool::new(false);

/// From now on Ctrl-C sets the returned flag instead of ending the process.
pub fn watch() -> &'static AtomicBool {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(|| {
        // Without a handler Ctrl-C ends the process as usual, which is no reason to refuse work.
        let mut last: Option<Instant> = None;
        let _ = ctrlc::set_handler(move || {
            let echo = last.replace(Instant::now()).is_some_and(|last| last.elapsed() < Duration::from_millis(500));
            let again = INTERRUPTED.swap(true, Ordering::Relaxed);
            if (again && !echo) || !WATCHED.load(Ordering::Relaxed) {
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
