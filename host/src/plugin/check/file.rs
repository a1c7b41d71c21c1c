//! The file and its opening: what the system's loader must find before a byte of the plugin runs, and what it finds then.

use super::{Outcome, Stop, subject::Subject};
use crate::plugin::permissions::refuse_others;
use std::time::{Duration, Instant};

/// A library is mapped, relocated and its layout compared, which takes a millisecond; this is for the slowest disk.
const MOST: Duration = Duration::from_secs(2);

/// Nobody but its owner may change it.
pub fn permissions(subject: &Subject) -> Outcome {
    refuse_others(&subject.job.plugin, "no plugin is opened from it")?;
    Ok(String::new())
}

/// Opens with every symbol bound, in time.
pub fn now(subject: &Subject) -> Outcome {
    let start = Instant::now();
    subject.library()?;
    let took = start.elapsed();
    if took > MOST {
        return Err(Stop::fail(format!(
            "it took {:.1} s to open; what it does before main is too much",
            took.as_secs_f64()
        )));
    }
    Ok(format!("{:.2} ms", 1e3 * took.as_secs_f64()))
}

/// What it says in code is what it says in the file.
pub fn same_note(subject: &Subject) -> Outcome {
    // Opening compares them.
    subject.library()?;
    Ok(String::new())
}

/// A second request gets the same library.
pub fn twice(subject: &Subject) -> Outcome {
    match subject.library()?.is_the_same_again()? {
        true => Ok(String::new()),
        false => Err(Stop::fail("a second request for it opened another library")),
    }
}
