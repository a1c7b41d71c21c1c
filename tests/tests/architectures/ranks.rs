//! Every architecture on several devices: each rank computes its share on the CPU, and the logits are those of one device. Where a model
//! is really cut, and where it stays whole, is held to a list, so that none of them quietly stops being shared.

use super::*;
use dylm::{adapter::Adapters, load::open};

/// Partial sums of two or three ranks are added in another order than one device adds them: f32's own noise, which some architectures
/// enlarge as they do against their reference.
fn bound(tiny: &Tiny) -> f32 {
    tiny.expected.bound.max(2e-5)
}

fn on(devices: usize) -> LoadOptions {
    LoadOptions { devices: (0..devices).collect(), ..Tiny::options() }
}

/// The entry on so many devices, or nothing where none of its matrices can be cut so.
fn shared(entry: &Path, folder: &Path, devices: usize) -> tiny::Result<Option<Tiny>> {
    match Tiny::open(entry, folder, &on(devices)) {
        Ok(tiny) => Ok(Some(tiny)),
        Err(e) if e.to_string().contains("name fewer devices") => Ok(None),
        Err(e) => Err(e),
    }
}

/// Three texts of different lengths in common steps, then each one a token further.
fn together(tiny: &Tiny) -> tiny::Result<Vec<Vec<f32>>> {
    let prompt = &tiny.expected.prompt;
    let texts = [prompt.as_slice(), &prompt[..5], &prompt[3..11]];
    let mut states = [tiny.state()?, tiny.state()?, tiny.state()?];
    let mut rows = Vec::new();
    for part in [0, 1] {
        let each = states.iter_mut().zip(texts).map(|(state, text)| {
            let cut = text.len() - 1;
            Input { state, tokens: if part == 0 { &text[..cut] } else { &text[cut..] }, want: Want::Last }
        });
        rows.extend(tiny.lm.model.step(&mut each.collect::<Vec<_>>())?.into_iter().flatten());
    }
    Ok(rows)
}

fn trimmed(tiny: &Tiny) -> tiny::Result<Vec<Vec<f32>>> {
    let (prompt, mut state) = (&tiny.expected.prompt, tiny.state()?);
    state.horizon = prompt.len();
    tiny.read(&mut state, prompt, Want::Nothing)?;
    state.trim(5)?;
    state.horizon = prompt.len();
    tiny.read(&mut state, &prompt[prompt.len() - 5..], Want::All)
}

#[test]
fn two_and_three_devices_give_the_logits_of_one() {
    each_entry(|entry| {
        let folder = tempfile::tempdir()?;
        tiny::write(entry, folder.path())?;
        let one = Tiny::open(entry, folder.path(), &Tiny::options())?;
        for devices in [2, 3] {
            let Some(tiny) = shared(entry, folder.path(), devices)? else { continue };
            let what = |what: &str| format!("{what} on {devices} devices");
            let bound = bound(&one);
            near(&what("straight"), &tiny.straight()?, &one.straight()?, bound)?;
            near(&what("in chunks"), &tiny.chunked(&[3, 4, 1, 20])?, &one.straight()?, bound)?;
            near(&what("batched"), &together(&tiny)?, &together(&one)?, bound)?;
            near(&what("trimmed"), &trimmed(&tiny)?, &trimmed(&one)?, bound)?;
        }
        Ok(())
    });
}

#[test]
fn print_what_is_cut() {
    let found = Mutex::new(Vec::new());
    each_entry(|entry| {
        let folder = tempfile::tempdir()?;
        tiny::write(entry, folder.path())?;
        let plan = open(folder.path().to_str(), &on(1))?.plan(&on(1), &Adapters::default())?;
        let parts = [2, 3].map(|n| plan.shared(n).map(|names| names.len()).unwrap_or(usize::MAX));
        found.lock().unwrap().push(format!("{} {parts:?} {:?}", tiny::name(entry), plan.shared(2).unwrap_or_default()));
        Ok(())
    });
    let mut found = found.into_inner().unwrap();
    found.sort();
    println!("{}", found.join("\n"));
}
