//! The first opening of a plugin that a user has just agreed to, in a process of its own: a library that is damaged where no look at it
//! tells, or whose initializers end the process that opens it, costs one sentence and leaves no consent behind.
//!
//! This is against accidents. The process has all the rights of the user, and does nothing later that it does not do here.

use super::{
    library::Library,
    note::Note,
    registry::Found,
    sandbox,
    trust::{Trust, Unknown},
};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

/// The hidden command of the child.
pub const COMMAND: &str = "first-opening-child";

/// Opening takes a millisecond.
const TIME: Duration = Duration::from_secs(20);

#[derive(Serialize, Deserialize)]
struct Job {
    plugin: PathBuf,
    sha256: String,
}

/// Opens the plugin in a child. An error means that the child did not live to tell; what else is wrong shows when it is opened here.
pub fn try_out(unknown: &Unknown) -> Result<()> {
    let Unknown { path, sha256, .. } = unknown;
    let job = Job { plugin: path.clone(), sha256: sha256.clone() };
    let ended = sandbox::run(COMMAND, &serde_json::to_string(&job).unwrap_or_default(), TIME)?;
    match ended.result {
        Some(_) => Ok(()),
        None => Err(Error::plugin(format!(
            "{}: was opened in a process of its own, and {}; it is not opened here: copy or build it again",
            path.display(),
            ended.end()
        ))),
    }
}

/// In the child.
pub fn child(folder: &Path) -> Result<()> {
    let file = folder.join(sandbox::JOB);
    let text = fs::read_to_string(&file).map_err(Error::io(&file))?;
    let Job { plugin: path, sha256 } =
        serde_json::from_str(&text).map_err(|e| Error::Usage(format!("{}: {e}", file.display())))?;
    // Another file may lie there by now: it was not agreed to.
    let trust = Trust::Hashes([sha256].into());
    let opened = Note::read(&path).and_then(|note| Library::open(&Found { path, note, trust }));
    sandbox::tell(folder, &opened.err().map(|e| e.to_string()).unwrap_or_default())
}
