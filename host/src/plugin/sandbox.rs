//! One operation in a process of its own, within bounds of time and memory: what a plugin does to that process, dylm lives to tell.
//!
//! The process is dylm itself, called with the folder of a job. The job and the result are files there, since standard output and error
//! are watched: a plugin has no business with them.

use crate::error::{Error, Result};
use std::{
    fs::{self, File},
    path::Path,
    process::{Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

/// The job, for the child.
pub const JOB: &str = "job.json";
/// What the child found.
pub const RESULT: &str = "result.json";
/// What the child was at, a line each.
pub const PLACE: &str = "place.txt";

/// How a child ended.
#[derive(Debug)]
pub struct Ended {
    /// What it found; `None` where it did not live to tell.
    pub result: Option<String>,
    /// How it ended; `None` where it was ended, for want of time.
    pub status: Option<ExitStatus>,
    /// What it was at last.
    pub place: String,
    /// What came on its standard output.
    pub stdout: String,
    /// And on its standard error.
    pub stderr: String,
    /// Since its start.
    pub took: Duration,
}

/// Runs `dylm COMMAND FOLDER` with this job, no longer than `time`.
pub fn run(command: &str, job: &str, time: Duration) -> Result<Ended> {
    let folder = tempfile::tempdir().map_err(Error::io(std::env::temp_dir()))?;
    let file = |name: &str| folder.path().join(name);
    let create = |name: &str| File::create(file(name)).map_err(Error::io(file(name)));
    fs::write(file(JOB), job).map_err(Error::io(file(JOB)))?;
    let own = std::env::current_exe().map_err(Error::io("the path of dylm itself"))?;
    let start = Instant::now();
    let mut child = Command::new(&own)
        .arg(command)
        .arg(folder.path())
        .stdin(Stdio::null())
        .stdout(create("stdout.txt")?)
        .stderr(create("stderr.txt")?)
        // What is measured here is a plugin, not how fast the machine is: two threads show what many show.
        .env("RAYON_NUM_THREADS", "2")
        .env("RUST_BACKTRACE", "0")
        .env("NO_COLOR", "1")
        // Memory that glibc keeps at hand for a thread counts as in use, which a test of leaks would take for one.
        .env("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")
        .spawn()
        .map_err(Error::io(&own))?;
    let status = loop {
        match child.try_wait().map_err(Error::io(&own))? {
            Some(status) => break Some(status),
            None if start.elapsed() >= time => {
                // It may just have ended by itself.
                let _ = child.kill();
                let _ = child.wait();
                break None;
            }
            None => thread::sleep(Duration::from_millis(2)),
        }
    };
    let text = |name: &str| String::from_utf8_lossy(&fs::read(file(name)).unwrap_or_default()).into_owned();
    Ok(Ended {
        result: fs::read_to_string(file(RESULT)).ok().filter(|_| status.is_some()),
        status,
        place: text(PLACE).lines().last().unwrap_or_default().to_owned(),
        stdout: text("stdout.txt"),
        stderr: text("stderr.txt"),
        took: start.elapsed(),
    })
}

/// In the child, before anything else: so many bytes beyond what it has, and no image of its memory on the disk if it dies. Says whether
/// the system keeps to it.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub fn limit_memory(bytes: u64) -> bool {
    use nix::sys::resource::{Resource, setrlimit};
    // In pages, the first number of the line.
    let statm = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0);
    let limit = bytes.saturating_add(pages.saturating_mul(4096));
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
    setrlimit(Resource::RLIMIT_AS, limit, limit).is_ok()
}

/// The same on systems that count no address space.
#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub fn limit_memory(_: u64) -> bool {
    false
}

impl Ended {
    /// What became of a child that told nothing, in the words of a sentence about "it".
    pub fn end(&self) -> String {
        let tells = |line: &&str| !line.is_empty() && !line.starts_with("note:");
        let said = self.stderr.lines().map(str::trim).rfind(tells).unwrap_or_default();
        let said = |what: String| if said.is_empty() { what } else { format!("{what} ({said})") };
        match self.status {
            None => format!("it did not end within {} s", self.took.as_secs()),
            Some(_) if self.stderr.contains("has overflowed its stack") => "it overflowed its stack".to_owned(),
            Some(_) if self.stderr.contains("memory allocation of") => {
                said("it asked for more memory than it may have".to_owned())
            }
            Some(status) => match (signal(status), status.code()) {
                (Some(signal), _) => said(format!("it died of {signal}")),
                (None, Some(code)) => said(format!("it ended the whole process with exit code {code}")),
                (None, None) => said(format!("it ended: {status}")),
            },
        }
    }
}

#[cfg(unix)]
fn signal(status: ExitStatus) -> Option<String> {
    use std::os::unix::process::ExitStatusExt;
    let signal = status.signal()?;
    let name = match signal {
        libc::SIGABRT => "SIGABRT, an abort",
        libc::SIGSEGV => "SIGSEGV, a bad address",
        libc::SIGBUS => "SIGBUS, memory that is not there",
        libc::SIGILL => "SIGILL, a bad instruction",
        libc::SIGFPE => "SIGFPE, a bad division",
        libc::SIGKILL => "SIGKILL, from outside or for want of memory",
        _ => return Some(format!("signal {signal}")),
    };
    Some(name.to_owned())
}

#[cfg(not(unix))]
fn signal(_: ExitStatus) -> Option<String> {
    None
}

/// Writes the child's result, at once or not at all.
pub fn tell(folder: &Path, result: &str) -> Result<()> {
    let (path, part) = (folder.join(RESULT), folder.join("result.part"));
    fs::write(&part, result).map_err(Error::io(&part))?;
    fs::rename(&part, &path).map_err(Error::io(&path))
}
