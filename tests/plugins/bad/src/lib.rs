//! A plugin that works, unless config.json's `misbehave` says how not to. Where safe Rust forbids the mistake, it is made with `transmute`.

mod worse;

use plugin_api::prelude::*;
use std::{
    cell::Cell,
    mem::{forget, transmute, transmute_copy},
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
};

config! {
    struct Config {
        vocab_size: usize,
        hidden_size: usize,
        misbehave: String = String::new(),
        divisor: usize = 1,
    }
}

struct Bad {
    misbehave: String,
    calls: AtomicUsize,
    embed_tokens: Embedding,
    norm: RmsNorm,
    lm_head: Linear,
    rope: Rope,
}

/// Steps run on whichever thread of a pool is free, so what one keeps another must find.
static KEPT: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static LAYER: Cell<Option<Layer>> = const { Cell::new(None) };
    static AT_EXIT: AtExit = const { AtExit };
}

/// Panics when its thread ends, in a destructor that no `catch_unwind` surrounds on most systems; here only a tensor is dropped.
struct AtExit;

impl Drop for AtExit {
    fn drop(&mut self) {
        // A tensor that outlives every call, dropped while the thread is taken apart.
        drop(forge(77));
    }
}

struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        panic!("a second panic");
    }
}

fn forge(handle: u64) -> Tensor {
    unsafe { transmute::<u64, Tensor>(handle) }
}

fn handle(tensor: &Tensor) -> u64 {
    unsafe { transmute_copy::<Tensor, u64>(tensor) }
}

impl Bad {
    fn misbehave_in_new(how: &str, w: &Weights) -> Result<()> {
        let table = || w.source("model.embed_tokens.weight");
        match how {
            "panic in new" => panic!("a deliberate panic in new"),
            "assert in new" => assert_eq!(1, 2, "a deliberate assertion"),
            "throw a bomb" => std::panic::panic_any(Bomb),
            "refuse" => return Err("config.json: this model is refused on purpose".into()),
            "run while building" => drop(w.tensor("model.norm.weight", &[64]).tensor().exp()),
            "ask for endless layers" => drop(w.at("x").each(1_000_000_000, |_, _| Ok(()))?),
            "ask for two million layers" => (0..2_000_000).for_each(|_| drop(w.rms_norm("model.norm", 64, 1e-5))),
            "ask for a million experts" => drop(w.experts(ExpertsShape::new(1_000_000, 64, 64))),
            "ask for a wrong shape" => drop(w.linear("lm_head", 65, 128, false)),
            "ask for a huge shape" => drop(w.linear("lm_head", usize::MAX, usize::MAX, false)),
            "reshape to a huge shape" => drop(w.tensor("model.norm.weight", &[1 << 33, 1 << 33])),
            "forge a source" => drop(Linear::of(unsafe { transmute::<u32, Source>(4711) }, None, 64, 128)),
            "transform without end" => {
                drop(Linear::of((0..900_000).fold(table(), |source, _| source.plus(1.0)), None, 64, 128))
            }
            "stack without end" => {
                drop(Linear::of((0..60).fold(table(), |source, _| Source::stack(&[source, source])), None, 64, 128))
            }
            "build off the thread" => std::thread::scope(|s| s.spawn(|| w.has("lm_head.weight")).join().map(|_| ()))
                .expect("the other thread panicked"),
            _ => {}
        }
        Ok(())
    }

    fn misbehave_in_forward(&self, h: &Tensor, step: &mut Step) -> Option<Tensor> {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        let heads = h.split_heads(16);
        let attend = |layer: &mut Layer, how: &Attend| layer.attend(heads.clone(), heads.clone(), heads.clone(), how);
        let plain = Attend { scale: 1.0, ..Default::default() };
        if let Some(worse) = worse::in_forward(&self.misbehave, call, h) {
            return Some(worse);
        }
        Some(match self.misbehave.as_str() {
            "panic in forward" => panic!("a deliberate panic in forward"),
            "panic after attention, later" if call == 2 => {
                drop(attend(&mut step.layers().next()?, &plain));
                panic!("a deliberate panic in call {call}")
            }
            "recur and panic later" => {
                let mut layer = step.layers().next()?;
                let y = layer.shift(h) + attend(&mut layer, &plain).merge_heads();
                if call == 3 {
                    panic!("a deliberate panic in call {call}");
                }
                y
            }
            "recur without a state" => step.layers().next()?.shift(h),
            "recur with a state of another shape" => step.layers().next()?.shift(h),
            "recur twice with one state" => step.layers().next()?.shift(&step.layers().next()?.shift(h)),
            "recur over other tokens" => step.layers().next()?.shift(&h.transpose()),
            "return no handle" => forge(0),
            "return a forged handle" => forge(0x0123_4567_89ab_cdef),
            "return a released handle" => {
                let raw = handle(&h.exp());
                forge(raw)
            }
            "use a released handle" => {
                let raw = handle(&h.exp());
                let stale = forge(raw);
                let y = h + &stale;
                forget(stale);
                y
            }
            "release twice" => {
                let raw = handle(&h.exp());
                drop(forge(raw));
                drop(forge(raw));
                return None;
            }
            "release the argument" => {
                drop(forge(handle(h)));
                return None;
            }
            "keep a tensor" => {
                forget(h.clone());
                let kept = KEPT.swap(handle(h), Ordering::Relaxed);
                return (kept != 0).then(|| h + forge(kept));
            }
            "compute off the thread" => {
                let raw = handle(h);
                let other = std::thread::spawn(move || {
                    let x = forge(raw);
                    let y = handle(&x.exp());
                    forget(x);
                    y
                });
                forge(other.join().expect("the other thread panicked"))
            }
            "leave a tensor to a thread" => {
                std::thread::spawn(|| AT_EXIT.with(|_| ())).join().expect("the other thread panicked");
                AT_EXIT.with(|_| ());
                return None;
            }
            "narrow too far" => h.narrow(60, 10),
            "add unlike shapes" => h + h.narrow(0, 3),
            "use an unknown layer" => unsafe { transmute::<u32, Linear>(4711) }.forward(h),
            "use a layer as another" => unsafe { transmute_copy::<Embedding, Linear>(&self.embed_tokens) }.forward(h),
            "give a layer a wrong width" => self.lm_head.forward(&h.narrow(0, 8)),
            "give sinks of a wrong size" => {
                let sinks = h.narrow(0, 3);
                attend(&mut step.layers().next()?, &Attend { sinks: Some(&sinks), ..plain })
            }
            "attend in head" => {
                LAYER.set(step.layers().next());
                return None;
            }
            "feed a cache twice" => {
                let mut layer = step.layers().next()?;
                drop(attend(&mut layer, &plain));
                return None;
            }
            "attend more often than declared" => {
                let mut layer = step.layers().next()?;
                drop(attend(&mut layer, &plain));
                attend(&mut layer, &plain).merge_heads()
            }
            "attend to fewer tokens" => {
                let fewer = h.transpose().narrow(0, 1).transpose().split_heads(16);
                let mut layer = step.layers().next()?;
                layer.attend(fewer.clone(), fewer.clone(), fewer, &plain).merge_heads()
            }
            "rotate other tokens" => {
                let mut layer = step.layers().next()?;
                layer.rotate(&self.rope, h.transpose().split_heads(1)).merge_heads()
            }
            "build while running" => {
                drop(Weights::default().linear("lm_head", 64, 128, false));
                return None;
            }
            "return a tensor of another shape" => h.transpose(),
            "return three axes" => h.split_heads(16),
            "fail with words" => Tensor::failed("a deliberate failure"),
            _ => return None,
        })
    }
}

impl Drop for Bad {
    fn drop(&mut self) {
        worse::anywhere(self.misbehave.strip_suffix(" in drop").unwrap_or_default());
        if self.misbehave == "panic in drop" {
            panic!("a deliberate panic in drop");
        }
    }
}

impl Architecture for Bad {
    const MODEL_TYPES: &'static [&'static str] = &["bad", "Bad-2.0"];
    type Config = Config;
    type Model = Self;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        w.ignore("model.layers.");
        Self::misbehave_in_new(&c.misbehave, w)?;
        let more = worse::in_new(&c.misbehave, c.divisor, w)?;
        if c.misbehave == "divide by a key" {
            let _ = std::hint::black_box(c.hidden_size / c.divisor);
        }
        (0..more).for_each(|_| drop(w.rms_norm("model.norm", c.hidden_size, 1e-5)));
        Ok(Self {
            misbehave: c.misbehave,
            calls: AtomicUsize::new(0),
            embed_tokens: w.embedding("model.embed_tokens", c.vocab_size, c.hidden_size),
            norm: w.rms_norm("model.norm", c.hidden_size, 1e-5),
            lm_head: w.linear("lm_head", c.hidden_size, c.vocab_size, false),
            rope: w.rope(16, 10_000.0, &None),
        })
    }
}

impl Model for Bad {
    fn caches(&self) -> Vec<Cache> {
        match self.misbehave.as_str() {
            "panic in caches" => panic!("a deliberate panic in caches"),
            "declare a cache too many" => vec![Cache::key_value(None); 2],
            "ask for a million caches" => vec![Cache::key_value(None); 1_000_000],
            "ask for a huge state" => vec![Cache::state(&[1 << 40, 1 << 40])],
            "recur with a state of another shape" => vec![Cache::state(&[1, 65])],
            "recur and panic later" | "recur twice with one state" | "recur over other tokens" => {
                vec![Cache::key_value(None).and(Cache::state(&[1, 64]))]
            }
            _ => vec![Cache::key_value(None)],
        }
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        let h = self.norm.forward(&self.embed_tokens.forward(tokens));
        if let Some(result) = self.misbehave_in_forward(&h, step) {
            return result;
        }
        let Some(mut layer) = step.layers().next() else { return Tensor::failed("no cache") };
        let heads = layer.rotate(&self.rope, h.split_heads(16));
        let how = Attend { scale: 0.25, ..Default::default() };
        h + layer.attend(heads.clone(), heads.clone(), heads, &how).merge_heads()
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        match self.misbehave.as_str() {
            "panic in head" => panic!("a deliberate panic in head"),
            "attend in head" => {
                let x = hidden.split_heads(16);
                let how = Attend { scale: 0.25, ..Default::default() };
                match LAYER.take() {
                    Some(mut layer) => layer.attend(x.clone(), x.clone(), x, &how).merge_heads(),
                    None => Tensor::failed("no layer was kept"),
                }
            }
            "return too few logits" => self.lm_head.forward(hidden).transpose().narrow(0, 0).transpose(),
            "return logits of three axes" => self.lm_head.forward(hidden).split_heads(16),
            _ => self.lm_head.forward(hidden),
        }
    }
}

export_plugin!(Bad, examples = ["config.json"]);
