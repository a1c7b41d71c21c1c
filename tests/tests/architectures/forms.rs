//! The same model in other forms: its state out of a file, its weights in 4 bits, an adapter laid over it.

use crate::{Held, Tiny, each, each_entry, near};
use dylm::{
    cache::{CacheOptions, prompt},
    model::Want,
};
use std::path::Path;
use tests::{tiny, variant};

#[test]
fn a_state_out_of_a_file_continues_as_the_one_that_was_saved() {
    each(|tiny| {
        let (prompt, steps) = (&tiny.expected.prompt, &tiny.expected.steps);
        let (folder, print) = (tempfile::tempdir()?, "of this model");
        let path = folder.path().join("prompt.safetensors");
        let origin = prompt::Origin { model: &tiny.name, fingerprint: print, text: &prompt::CachedText::default() };
        let mut state = tiny.state()?;
        state.horizon = prompt.len();
        tiny.read(&mut state, prompt, Want::Nothing)?;
        prompt::save(&path, &state, &origin)?;
        let opened = prompt::PromptCache::open(&path)?;
        let mut again = opened.state(&tiny.lm.model, print, &CacheOptions::default())?;
        if again.offset != prompt.len() {
            return Err(format!("the file has {} tokens, not {}", again.offset, prompt.len()).into());
        }
        let kept = tiny.read(&mut state, steps, Want::All)?;
        near("out of the file", &tiny.read(&mut again, steps, Want::All)?, &kept, 1e-6)?;
        // What a conversation does with it: forget the end, say something else.
        for state in [&mut state, &mut again] {
            state.trim(steps.len() - 1)?;
        }
        let kept = tiny.read(&mut state, &prompt[..3], Want::All)?;
        near("out of the file, trimmed", &tiny.read(&mut again, &prompt[..3], Want::All)?, &kept, 1e-6)
    });
}

#[test]
fn weights_in_4_bits_give_the_logits_of_the_numbers_they_stand_for() {
    each_entry(|entry| {
        if variant::is_packed(entry)? {
            return Ok(());
        }
        if !variant::can_pack(entry)? {
            return packs_elsewhere(entry);
        }
        let (packed, unpacked) = (tempfile::tempdir()?, tempfile::tempdir()?);
        variant::pack(entry, packed.path(), unpacked.path())?;
        let [packed, unpacked] = [packed, unpacked].map(|folder| Tiny::open(entry, folder.path(), &Tiny::options()));
        let (packed, unpacked) = (packed?, unpacked?);
        near("in 4 bits", &packed.straight()?, &unpacked.straight()?, packed.expected.bound)
    });
}

/// Sizes that no group of 32 fits are worth testing too, as long as another entry of the same type has others.
fn packs_elsewhere(entry: &Path) -> Held {
    let model_type = tiny::config(entry)?["model_type"].clone();
    for other in tiny::all_entries()? {
        if tiny::config(&other)?["model_type"] == model_type && variant::can_pack(&other)? {
            return Ok(());
        }
    }
    Err(format!(
        "no weight of any entry of {model_type} has a last axis divisible by 32, so that 4 bits are untested: \
         let hidden_size be 32 or 64 in one of them"
    )
    .into())
}

#[test]
fn an_adapter_gives_the_logits_of_the_weights_it_is_multiplied_into() {
    each_entry(|entry| match takers(entry)? {
        Ok(()) => Ok(()),
        Err(refused) => adapts_elsewhere(entry, &refused),
    });
}

/// Whether any linear layer takes an adapter; inside, those that refuse. Of weights that the architecture takes apart or turns the host
/// cannot adapt all; then it has to say so, by name.
fn takers(entry: &Path) -> tiny::Result<Result<(), Vec<String>>> {
    let paths = variant::linears(entry)?;
    let packed_only = paths.is_empty() && variant::is_packed(entry)?;
    if packed_only || adapts(entry, &paths)?.is_ok() {
        return Ok(Ok(()));
    }
    let (mut taken, mut refused) = (false, Vec::new());
    for path in paths {
        match adapts(entry, std::slice::from_ref(&path))? {
            Ok(()) => taken = true,
            Err(wrong) if wrong.contains(tail(&path)) && wrong.contains("the adapter changes") => refused.push(path),
            Err(wrong) => return Err(wrong.into()),
        }
    }
    Ok(if taken { Ok(()) } else { Err(refused) })
}

/// A layout that takes none is fine where another entry of the same type does.
fn adapts_elsewhere(entry: &Path, refused: &[String]) -> Held {
    let model_type = tiny::config(entry)?["model_type"].clone();
    for other in tiny::all_entries()? {
        if other != *entry && tiny::config(&other)?["model_type"] == model_type && takers(&other)?.is_ok() {
            return Ok(());
        }
    }
    Err(format!("no linear layer takes an adapter; refused are {}", refused.join(", ")).into())
}

/// A path from its layer's number on; what is before it is another for wrapped models.
fn tail(path: &str) -> &str {
    path.find(|c: char| c.is_ascii_digit()).map_or(path, |at| &path[at..])
}

/// Holds the entry with an adapter over these layers to the one with changed weights; inside, what is wrong with the adapter.
fn adapts(entry: &Path, paths: &[String]) -> tiny::Result<Result<(), String>> {
    let (plain, adapter, merged) = (tempfile::tempdir()?, tempfile::tempdir()?, tempfile::tempdir()?);
    variant::adapt(entry, paths, adapter.path(), merged.path())?;
    tiny::write(entry, plain.path())?;
    let mut options = Tiny::options();
    let merged = Tiny::open(entry, merged.path(), &options)?;
    options.adapter_path = Some(adapter.path().to_owned());
    let ours = match Tiny::open(entry, plain.path(), &options) {
        Ok(tiny) => tiny.straight()?,
        Err(wrong) => return Ok(Err(wrong.to_string())),
    };
    let held = near("with an adapter", &ours, &merged.straight()?, merged.expected.bound);
    Ok(held.map_err(|wrong| format!("{}: {wrong}", paths.join(", "))))
}
