//! Who else decides what stands in a file: a library that somebody else may write to is somebody else's code.
//!
//! A file and the folders that it lies in must belong to the user, to root, or to whoever owns dylm itself, and nobody else may write to
//! them. A group may, if it is the owner's private one: where each user has a group of their own, umask is 002, and all that cargo builds
//! is writable by that group.

use crate::error::{Error, Result};
use std::path::Path;

/// Refuses a file that somebody else may change or replace, in a sentence that ends with the cure. `so` says what is not done with it.
#[cfg(unix)]
pub fn refuse_others(path: &Path, so: &str) -> Result<()> {
    // A link is as safe as what it leads to and as the folder that it lies in.
    let real = path.canonicalize().map_err(Error::io(path))?;
    for folder in [path.parent(), real.parent()].into_iter().flatten() {
        refuse(folder, "folder", so)?;
    }
    refuse(&real, "file", so)
}

#[cfg(not(unix))]
pub fn refuse_others(_: &Path, _: &str) -> Result<()> {
    Ok(())
}

#[cfg(unix)]
fn refuse(path: &Path, what: &str, so: &str) -> Result<()> {
    use nix::unistd::Uid;
    use std::os::unix::fs::MetadataExt;
    const GROUP_WRITES: u32 = 0o020;
    const OTHERS_WRITE: u32 = 0o002;
    const STICKY: u32 = 0o1000;
    let metadata = std::fs::metadata(path).map_err(Error::io(path))?;
    let (mode, owner, group) = (metadata.mode(), metadata.uid(), metadata.gid());
    let because = |why: String, cure: &str| Err(Error::plugin(format!("{}: {why}, so {so}; {cure}", path.display())));
    if owner != 0 && owner != Uid::effective().as_raw() && Some(owner) != owner_of_dylm() {
        let why = format!("this {what} belongs to {}, who is neither you nor root", user_name(owner));
        return because(why, &format!("make it yours (chown), or copy it to a {what} that is"));
    }
    // In a sticky folder, such as /tmp, others may add files, but not change those that are there.
    if what == "folder" && mode & STICKY != 0 {
        return Ok(());
    }
    if mode & OTHERS_WRITE != 0 {
        return because(format!("everybody may write to this {what}"), "chmod o-w it");
    }
    if mode & GROUP_WRITES != 0 && !is_private(owner, group) {
        return because(format!("the group {} may write to this {what}", group_name(group)), "chmod g-w it");
    }
    Ok(())
}

/// Whoever may replace dylm needs no plugin to be obeyed.
#[cfg(unix)]
fn owner_of_dylm() -> Option<u32> {
    use std::{os::unix::fs::MetadataExt, sync::OnceLock};
    static OWNER: OnceLock<Option<u32>> = OnceLock::new();
    *OWNER.get_or_init(|| Some(std::env::current_exe().ok()?.metadata().ok()?.uid()))
}

/// Whether a group has nobody in it but the owner: it is called like them and lists no other member. Where the system knows neither by
/// name (a container run as a bare number), equal numbers must do.
#[cfg(unix)]
fn is_private(owner: u32, group: u32) -> bool {
    use nix::unistd::{Gid, Group, Uid, User};
    let user = User::from_uid(Uid::from_raw(owner)).ok().flatten();
    let entry = Group::from_gid(Gid::from_raw(group)).ok().flatten();
    match (user, entry) {
        (Some(user), Some(entry)) => user.name == entry.name && entry.mem.iter().all(|member| *member == user.name),
        (None, None) => owner == group,
        _ => false,
    }
}

#[cfg(unix)]
fn user_name(id: u32) -> String {
    let user = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(id)).ok().flatten();
    user.map_or_else(|| format!("user {id}"), |user| user.name)
}

#[cfg(unix)]
fn group_name(id: u32) -> String {
    let group = nix::unistd::Group::from_gid(nix::unistd::Gid::from_raw(id)).ok().flatten();
    group.map_or_else(|| id.to_string(), |group| group.name)
}
