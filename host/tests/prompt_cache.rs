//! Prompt cache files: every kind of cache comes back bit for bit, mlx-lm's own files are taken, and damaged ones are refused in a sentence.

use candle_core::{DType, Tensor};
use dylm::{
    cache::{
        CacheOptions, State,
        kv::KvCache,
        memory::Memory,
        prompt::{CachedText, Origin, PromptCache, save},
        rows::Table,
    },
    device::{DeviceChoice, DtypeChoice, Placement},
};
use plugin_api::abi::{CACHE_KEY_VALUE, CACHE_POOLED, CACHE_STATE, CacheSpec};
use safetensors::tensor::{Dtype, TensorView};
use std::{collections::HashMap, fs, path::Path};

const SHAPE: [usize; 4] = [2, 32, 2, 64];

fn cpu(dtype: DtypeChoice) -> Placement {
    Placement::new(DeviceChoice::Cpu, dtype, DType::F32).unwrap()
}

/// One layer that sees everything, one with a window.
fn specs() -> Vec<CacheSpec> {
    [0, 40].map(|window| CacheSpec { kind: CACHE_KEY_VALUE, flags: 0, window, dims: [0; 6] }).to_vec()
}

/// One layer with a window, and one with a key for every four tokens.
fn pooling() -> Vec<CacheSpec> {
    let of_four = CacheSpec { kind: CACHE_POOLED, flags: 0, window: 0, dims: [4, 0, 0, 0, 0, 0] };
    vec![specs()[1], of_four]
}

/// A state that has seen `tokens` tokens, with numbers that no two entries share.
fn state(place: &Placement, options: CacheOptions, tokens: usize) -> State {
    state_of(&specs(), place, options, tokens)
}

fn state_of(specs: &[CacheSpec], place: &Placement, options: CacheOptions, tokens: usize) -> State {
    let mut state = State::new(specs, place, &options).unwrap();
    for (index, layer) in state.layers.iter_mut().filter_map(Memory::key_value_mut).enumerate() {
        layer.shape = Some(SHAPE);
        for at in 0..tokens {
            let number = |i: usize| ((at * 131 + i * 7 + index) % 997) as f32 / 100.0 - 4.0;
            let keys: Vec<f32> = (0..SHAPE[0] * SHAPE[1]).map(number).collect();
            let values: Vec<f32> = (0..SHAPE[2] * SHAPE[3]).map(|i| number(i + 1)).collect();
            if place.native {
                layer.append(&keys, &values, at, 1);
            } else {
                let tensor = |x: Vec<f32>, dim| Tensor::from_vec(x, (1, 2, dim), &place.device).unwrap();
                layer.append_tensors(&tensor(keys, SHAPE[1]), Some(&tensor(values, SHAPE[3])), at, 1).unwrap();
            }
            layer.settle(at + 1).unwrap();
        }
    }
    state.offset = tokens;
    state.tokens = (0..tokens as u32).map(|t| t * 3 % 101).collect();
    state.horizon = tokens + 5;
    state
}

fn kept(state: &State) -> impl Iterator<Item = &KvCache> {
    state.layers.iter().filter_map(Memory::key_value)
}

fn write(path: &Path, state: &State) {
    let text = CachedText { system_prompt: None, text: "hello".into(), chat: true };
    save(path, state, &Origin { model: "a/model", fingerprint: "f", text: &text }).unwrap();
}

fn read(path: &Path, place: &Placement) -> dylm::Result<State> {
    read_of(&specs(), path, place)
}

fn read_of(specs: &[CacheSpec], path: &Path, place: &Placement) -> dylm::Result<State> {
    let cache = PromptCache::open(path)?;
    let mut state = State::new(specs, place, &cache.options(&CacheOptions::default())?)?;
    cache.read_into(&mut state, place)?;
    Ok(state)
}

fn bits(table: &Table) -> Vec<u32> {
    table.numbers().unwrap().iter().map(|x| x.to_bits()).collect()
}

fn assert_comes_back(place: &Placement, options: CacheOptions, tokens: usize) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("prompt.cache");
    for specs in [specs(), pooling()] {
        let before = state_of(&specs, place, options, tokens);
        write(&path, &before);
        assert_same(&read_of(&specs, &path, place).unwrap(), &before);
    }
    write(&path, &state_of(&pooling(), place, options, tokens));
    assert!(read(&path, place).is_err(), "keys of four tokens taken for keys of one");
}

fn assert_same(after: &State, before: &State) {
    assert_eq!((after.offset, &after.tokens, after.horizon), (before.offset, &before.tokens, before.horizon));
    assert_eq!(after.options, before.options);
    for (after, before) in kept(after).zip(kept(before)) {
        assert_eq!((&after.positions, after.shape), (&before.positions, before.shape));
        assert_eq!(std::mem::discriminant(&after.keys), std::mem::discriminant(&before.keys));
        assert_eq!(bits(&after.keys), bits(&before.keys));
        assert_eq!(bits(&after.values), bits(&before.values));
        assert_eq!(after.bytes(), before.bytes());
    }
}

#[test]
fn caches_of_every_float_come_back() {
    for dtype in [DtypeChoice::Float32, DtypeChoice::Bfloat16, DtypeChoice::Float16] {
        assert_comes_back(&cpu(dtype), CacheOptions::default(), 7);
    }
    let candle = Placement::new(DeviceChoice::CpuByCandle, DtypeChoice::Float32, DType::F32).unwrap();
    // Of three tokens no key for four is there yet.
    for tokens in [3, 7] {
        assert_comes_back(&candle, CacheOptions::default(), tokens);
        assert_comes_back(&cpu(DtypeChoice::Float32), CacheOptions::default(), tokens);
    }
}

#[test]
fn caches_that_dropped_entries_come_back() {
    let options = CacheOptions { max_kv_size: Some(100), ..Default::default() };
    let place = cpu(DtypeChoice::Float32);
    assert!(kept(&state(&place, options, 900)).all(|l| l.positions.len() < 900), "something was dropped");
    assert_comes_back(&place, options, 900);
    assert_comes_back(&place, CacheOptions::default(), 900);
}

#[test]
fn quantized_caches_come_back() {
    for bits in [2, 3, 4, 5, 6, 8] {
        let options =
            CacheOptions { kv_bits: Some(bits), kv_group_size: 32, quantized_kv_start: 3, ..Default::default() };
        let packed = state(&cpu(DtypeChoice::Auto), options, 9);
        assert!(kept(&packed).all(|kv| matches!(kv.keys, Table::Packed { .. })));
        assert_comes_back(&cpu(DtypeChoice::Auto), options, 9);
    }
    let windowed = CacheOptions { max_kv_size: Some(100), kv_bits: Some(4), kv_group_size: 32, quantized_kv_start: 0 };
    assert_comes_back(&cpu(DtypeChoice::Auto), windowed, 900);
}

type Parts = (Vec<(String, Dtype, Vec<usize>, Vec<u8>)>, HashMap<String, String>);

/// A plain cache as mlx-lm 0.32.2 writes it: room for 8 tokens, 3 of them used; `old` is the layout before, without spare room.
fn of_mlx_lm(old: bool) -> Parts {
    let room = if old { 3 } else { 8 };
    let mut metadata = HashMap::new();
    let (facts, classes) = if old { ("1", "2") } else { ("0", "1") };
    metadata.insert(format!("{facts}.model"), "a/model".to_owned());
    metadata.insert(format!("{facts}.tokenizer_config"), "{}".to_owned());
    let mut tensors = Vec::new();
    for layer in 0..2 {
        metadata.insert(format!("{classes}.{layer}"), "KVCache".to_owned());
        for part in 0..2usize {
            let dim = SHAPE[1 + 2 * part];
            // Head h, token t, lane i is h * 100 + t * 10 + part, whatever the lane.
            let number = |at: usize| (at / (room * dim) * 100 + at / dim % room * 10 + part) as f32;
            let bytes = (0..2 * room * dim).flat_map(|at| number(at).to_le_bytes()).collect();
            tensors.push((format!("{layer}.{part}"), Dtype::F32, vec![1, 2, room, dim], bytes));
        }
        if old {
            metadata.insert(format!("0.{layer}"), String::new());
        } else {
            tensors.push((format!("{layer}.2"), Dtype::I32, vec![], 3i32.to_le_bytes().to_vec()));
        }
    }
    (tensors, metadata)
}

fn write_parts(path: &Path, (tensors, metadata): &Parts) {
    let views =
        tensors.iter().map(|(n, dtype, shape, bytes)| (n, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, Some(metadata.clone()), path).unwrap();
}

#[test]
fn plain_caches_of_mlx_lm_are_taken() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mlx.safetensors");
    for old in [false, true] {
        write_parts(&path, &of_mlx_lm(old));
        let cache = PromptCache::open(&path).unwrap();
        assert_eq!((cache.tokens(), cache.model.as_str(), cache.fingerprint.as_deref()), (3, "a/model", None));
        let state = read(&path, &cpu(DtypeChoice::Float32)).unwrap();
        let caches: Vec<_> = kept(&state).collect();
        let (first, second) = (caches[0], caches[1]);
        assert_eq!((state.offset, &second.positions), (3, &vec![0, 1, 2]));
        assert_eq!(first.shape, Some(SHAPE));
        let values = second.values.numbers().unwrap();
        // [token, head, lane]
        let seen: Vec<f32> = values.chunks(SHAPE[3]).map(|lanes| lanes[5]).collect();
        assert_eq!(seen, [1.0, 101.0, 11.0, 111.0, 21.0, 121.0]);
    }
}

/// The sentence of a file made wrong.
fn refusal(change: impl FnOnce(&mut Parts)) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.safetensors");
    let mut parts = of_mlx_lm(false);
    change(&mut parts);
    write_parts(&path, &parts);
    let error = read(&path, &cpu(DtypeChoice::Float32)).err().expect("a wrong file is refused").to_string();
    assert!(error.contains("bad.safetensors") && !error.contains('\n'), "{error}");
    error
}

/// A state of `tokens` tokens in a model of recurrences alone, or with keys and values beside them.
fn recurrent(hybrid: bool, rows: u64, tokens: usize) -> State {
    let spec = |dims| CacheSpec { kind: CACHE_STATE, flags: 0, window: 0, dims };
    // The second is that of a convolution over one token: empty.
    let mut all = vec![spec([rows, 2, 4, 0, 0, 0]), spec([0, 5, 0, 0, 0, 0])];
    all.extend(hybrid.then(|| specs()[0]));
    let mut state = State::new(&all, &cpu(DtypeChoice::Float32), &CacheOptions::default()).unwrap();
    for memory in &mut state.layers {
        match memory {
            Memory::State(s) => {
                s.numbers.here().unwrap().iter_mut().enumerate().for_each(|(i, x)| *x = (i as f32 + 0.1).sqrt())
            }
            Memory::KeyValue(kv) => {
                kv.shape = Some([1, 1, 1, 1]);
                kv.append(&vec![0.5; tokens], &vec![0.25; tokens], 0, tokens);
            }
        }
    }
    (state.offset, state.tokens) = (tokens, (0..tokens as u32).collect());
    state
}

#[test]
fn states_of_recurrences_come_back_and_can_be_gone_back_from() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.cache");
    for hybrid in [false, true] {
        let before = recurrent(hybrid, 3, 9);
        write(&path, &before);
        let mut after = recurrent(hybrid, 3, 0);
        PromptCache::open(&path).unwrap().read_into(&mut after, &cpu(DtypeChoice::Float32)).unwrap();
        assert_eq!((after.offset, &after.tokens), (9, &before.tokens));
        for (after, before) in after.layers.iter().zip(&before.layers) {
            assert_eq!(after.state(), before.state());
        }
        assert!(after.can_trim(0) && after.can_trim(4));
        after.trim(4).unwrap();
        assert_eq!(after.layers[0].state().unwrap().numbers, vec![0.0; 24].into());
    }
}

#[test]
fn a_state_of_another_shape_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.cache");
    write(&path, &recurrent(false, 3, 9));
    let error = PromptCache::open(&path).unwrap().read_into(&mut recurrent(false, 4, 0), &cpu(DtypeChoice::Float32));
    let error = error.unwrap_err().to_string();
    assert!(error.contains("0.0.0: F32 [1, 3, 2, 4], the model's state is F32 [1, ..] of [4, 2, 4]"), "{error}");
}

#[test]
fn wrong_files_are_refused_in_a_sentence() {
    assert!(refusal(|(_, m)| m.clear()).contains("no prompt cache"));
    assert!(refusal(|(_, m)| drop(m.remove("0.model"))).contains("which model"));
    assert!(refusal(|(_, m)| drop(m.remove("1.1"))).contains("1 layers"));
    assert!(refusal(|(_, m)| drop(m.insert("1.1".into(), "ArraysCache".into()))).contains("ArraysCache"));
    assert!(refusal(|(t, _)| drop(t.remove(0))).contains("0.0: not in the file"));
    assert!(refusal(|(t, _)| t[2].3 = 9i32.to_le_bytes().to_vec()).contains("layer 1 has seen 3 tokens"));
    assert!(refusal(|(t, _)| [2, 5].iter().for_each(|&i| t[i].3 = 9i32.to_le_bytes().to_vec())).contains("9 tokens"));
    assert!(refusal(|(t, _)| [2, 5].iter().for_each(|&i| t[i].3 = (-1i32).to_le_bytes().to_vec())).contains("0.2"));
    assert!(refusal(|(t, _)| [2, 5].iter().for_each(|&i| t[i].3 = 0i32.to_le_bytes().to_vec())).contains("no tokens"));
    assert!(refusal(|(t, _)| t[0].2 = vec![2, 1, 8, 32]).contains("is not [1, kv_heads"));
    assert!(refusal(|(t, _)| t[0].1 = Dtype::I32).contains("I32"));
    // No bytes, and room for any number of tokens.
    assert!(refusal(|(t, _)| (t[0].2, t[0].3) = (vec![1, 2, 1 << 40, 0], Vec::new())).contains("0.0"));
    assert!(refusal(|(_, m)| drop(m.insert("0.dylm".into(), "{\"format\": 2}".into()))).contains("later dylm"));
    assert!(refusal(|(_, m)| drop(m.insert("0.dylm".into(), "{\"format\": 1}".into()))).contains("damaged"));
}

/// dylm's own file with its facts changed.
fn refusal_of_facts(change: impl FnOnce(&mut serde_json::Value)) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("own.safetensors");
    write(&path, &state(&cpu(DtypeChoice::Float32), CacheOptions::default(), 4));
    let bytes = fs::read(&path).unwrap();
    let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: serde_json::Value = serde_json::from_slice(&bytes[8..end]).unwrap();
    let mut facts = serde_json::from_str(header["__metadata__"]["0.dylm"].as_str().unwrap()).unwrap();
    change(&mut facts);
    header["__metadata__"]["0.dylm"] = facts.to_string().into();
    let header = header.to_string();
    fs::write(&path, [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &bytes[end..]].concat()).unwrap();
    read(&path, &cpu(DtypeChoice::Float32)).err().expect("wrong facts are refused").to_string()
}

#[test]
fn facts_that_contradict_the_tensors_are_refused() {
    use serde_json::json;
    assert!(refusal_of_facts(|f| f["tokens"] = json!([1, 2])).contains("2 token ids for 4 tokens"));
    assert!(refusal_of_facts(|f| f["positions"] = json!([])).contains("positions"));
    assert!(refusal_of_facts(|f| f["positions"][0] = json!([[0, 2], [1, 4]])).contains("positions"));
    assert!(refusal_of_facts(|f| f["positions"][0] = json!([[3, 4], [0, 4]])).contains("positions"));
    assert!(refusal_of_facts(|f| f["positions"][1] = json!([[0, 4_000_000_000u32]])).contains("positions"));
    assert!(refusal_of_facts(|f| f["options"]["kv_bits"] = json!(7)).contains("--kv-bits 7"));
    assert!(refusal_of_facts(|f| f["options"]["kv_group_size"] = json!(0)).contains("--kv-group-size"));
}

#[test]
fn a_cut_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cut.safetensors");
    write(&path, &state(&cpu(DtypeChoice::Float32), CacheOptions::default(), 4));
    let bytes = fs::read(&path).unwrap();
    for keep in [0, 5, 100, bytes.len() - 1] {
        fs::write(&path, &bytes[..keep]).unwrap();
        assert!(PromptCache::open(&path).is_err(), "{keep} bytes");
    }
}

#[test]
fn saving_over_a_file_leaves_nothing_else_in_the_folder() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("prompt.cache");
    let place = cpu(DtypeChoice::Float32);
    write(&path, &state(&place, CacheOptions::default(), 3));
    write(&path, &state(&place, CacheOptions::default(), 5));
    assert_eq!(read(&path, &place).unwrap().offset, 5);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}
