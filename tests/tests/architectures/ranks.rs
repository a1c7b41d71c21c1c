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
        let straight = one.straight()?;
        for devices in [2, 3] {
            let Some(tiny) = shared(entry, folder.path(), devices)? else { continue };
            let what = |what: &str| format!("{what} on {devices} devices");
            let bound = bound(&one);
            near(&what("straight"), &tiny.straight()?, &straight, bound)?;
            if devices > 2 {
                continue;
            }
            near(&what("in chunks"), &tiny.chunked(&[3, 4, 1, 20])?, &straight, bound)?;
            near(&what("batched"), &together(&tiny)?, &together(&one)?, bound)?;
            near(&what("trimmed"), &trimmed(&tiny)?, &trimmed(&one)?, bound)?;
        }
        Ok(())
    });
}

/// What the entry's matrices are called that so many devices share; of experts, the first one's first.
fn cut(entry: &Path, devices: usize) -> tiny::Result<Vec<String>> {
    let folder = tempfile::tempdir()?;
    tiny::write(entry, folder.path())?;
    let plan = open(folder.path().to_str(), &on(1))?.plan(&on(1), &Adapters::default())?;
    Ok(plan.shared(devices)?)
}

/// Nothing of these can be cut (`*` stands for any variant): BitNet rounds inputs by the largest of a whole row, and these recurrences
/// mix what a cut would part.
const WHOLE: [&str; 3] = ["bitnet", "falcon_mamba", "mamba*"];

/// Of these, only feed-forward blocks are cut: attention has norms over all heads at once, projections that are split after they were
/// made, one head only, or a recurrence in its place.
const ONLY_FEED_FORWARD: [&str; 13] = [
    "baichuan_m1",
    "codegen",
    "deepseek_v4*",
    "diffllama",
    "flex_olmo",
    "gpt2*",
    "gpt_bigcode",
    "minimax_m2*",
    "olmo2",
    "olmo3*",
    "olmo_hybrid*",
    "olmoe*",
    "plamo",
];

#[test]
fn every_architecture_is_cut_but_those_that_cannot_be() {
    each_entry(|entry| {
        let (name, names) = (tiny::name(entry), cut(entry, 2)?);
        let is =
            |list: &[&str]| list.iter().any(|of| of.strip_suffix('*').map_or(name == *of, |of| name.starts_with(of)));
        let attention = ["attn", "attention", "mixer", "temporal_block", "wo"];
        let attends = names.iter().any(|name| attention.iter().any(|part| name.contains(part)));
        match (is(&WHOLE), is(&ONLY_FEED_FORWARD)) {
            (true, _) if names.is_empty() => Ok(()),
            (_, true) if !names.is_empty() && !attends => Ok(()),
            (false, false) if attends => Ok(()),
            _ => Err(format!("cut are {names:?}").into()),
        }
    });
}

#[test]
fn a_llama_gives_each_device_its_heads_and_its_lanes() {
    let entry = tiny::fixtures().join("llama");
    let names = cut(&entry, 2).unwrap();
    for projection in ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"] {
        assert!(names.contains(&format!("model.layers.0.{projection}")), "{projection} is whole: {names:?}");
    }
    // Its two key heads cannot be three, but the lanes of its feed-forward blocks can.
    let names = cut(&entry, 3).unwrap();
    assert!(names.iter().all(|name| name.contains(".mlp.")) && !names.is_empty(), "{names:?}");
}

#[test]
fn packed_weights_are_cut_where_groups_end() {
    for name in ["llama", "gemma2", "mixtral", "gpt_oss"] {
        let entry = tiny::fixtures().join(name);
        let (packed, unpacked) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        tests::variant::pack(&entry, packed.path(), unpacked.path()).unwrap();
        let one = Tiny::open(&entry, packed.path(), &Tiny::options()).unwrap();
        let two = Tiny::open(&entry, packed.path(), &on(2)).unwrap();
        near(name, &two.straight().unwrap(), &one.straight().unwrap(), bound(&one)).unwrap();
    }
}
