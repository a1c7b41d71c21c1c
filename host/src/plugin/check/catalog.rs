//! All tests, in the order in which they are told: what a pass means, what an author mends otherwise, and what must hold before it makes
//! sense to ask.

use super::{
    Outcome, Stop, abi, build, caches, config, errors, file, note, numerics, resources, shapes,
    subject::{Job, Subject},
    threads,
};
use crate::{
    error::{Error, Result},
    plugin::sandbox,
};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    path::Path,
    time::Duration,
};

/// What must hold before a test makes sense: the gates of all stages before its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Nothing: the file is looked at.
    File,
    /// The file is a plugin's: it is opened.
    Open,
    /// It opens: models are described.
    Build,
    /// Its examples build: models run.
    Run,
}

/// One test.
pub struct Test {
    /// `group-rest`, kebab case.
    pub name: &'static str,
    /// What a pass means.
    pub what: &'static str,
    /// What to look at where it fails.
    pub mend: &'static str,
    /// When it makes sense.
    pub stage: Stage,
    /// Whether tests of later stages are skipped where it fails.
    pub gate: bool,
    run: fn(&Subject) -> Outcome,
}

/// What came of a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It holds.
    Pass,
    /// It does not.
    Fail,
    /// It was not asked.
    Skip,
}

/// A test's verdict with its reason.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Pass, fail or skip.
    pub verdict: Verdict,
    /// What was seen, or why not; may be empty.
    pub reason: String,
    /// How long its process lived.
    #[serde(default)]
    pub milliseconds: u64,
}

macro_rules! tests {
    ($($stage:ident $($gate:ident)? => $name:literal $run:path: $what:literal, $mend:literal;)*) => {
        /// Every test.
        pub const TESTS: &[Test] = &[$(Test {
            name: $name, what: $what, mend: $mend, stage: Stage::$stage, gate: tests!(@gate $($gate)?), run: $run,
        }),*];
    };
    (@gate) => { false };
    (@gate gate) => { true };
}

tests! {
    File gate => "note-present" note::present: "the file is a whole library for this machine, with a note",
        "Build it as a cdylib that calls export_plugin! once, and copy the whole file.";
    File => "note-names" note::names: "its model_types are names that a model can ask for, each once",
        "Look at MODEL_TYPES in `impl Architecture`.";
    File => "note-origin" note::origin: "version, licence, compiler and target are told",
        "They come from the crate's Cargo.toml: version = \"1.2.3\", license = \"..\".";
    File => "note-abi" note::abi: "it speaks an ABI that this dylm speaks, and needs no op that it lacks",
        "Build it with this dylm's plugin-api, or update dylm.";
    File => "note-panic" note::panic: "its panics unwind",
        "Build it with panic = \"unwind\", which is cargo's default: a panic can then be caught and told.";
    File => "file-name" note::file_name: "the file is called after a model_type that it serves",
        "Name the crate, or its [lib], like its first model_type; - and . become _.";
    File => "file-permissions" file::permissions: "nobody but its owner may change it",
        "chmod go-w the file and its folder.";
    Open gate => "load-now" file::now: "it opens with every symbol bound, in time",
        "Look for symbols that no library has (link what you use), and for work done before anything is asked of the plugin.";
    Open => "load-note" file::same_note: "its code says of itself what its note says",
        "The file was changed after it was linked; build it again.";
    Open => "load-twice" file::twice: "opened again, it is the same library",
        "Two copies of one static are at work; do not load libraries from a plugin.";
    Build => "abi-extension" abi::unknown_extension: "it says null to an extension that it does not know",
        "Compare ids as whole texts, and return None for all others.";
    Build => "abi-model-extension" abi::unknown_model_extension: "its models say null to an extension that they do not know",
        "Compare ids as whole texts, and return None for all others.";
    Build => "abi-poorer-host" abi::poorer_host: "a host without its ops is refused with one sentence",
        "export_plugin! does this; a plugin without it compares the host's op table before it calls an op.";
    Run => "abi-oldest-host" abi::oldest_host: "its note names every op that a host of ABI 1.0 lacks",
        "export_plugin! does this; do not reach ops around the words of plugin-api.";
    Run => "abi-newer-host" abi::newer_host: "a host with more ops than it knows makes no difference",
        "export_plugin! does this; a plugin without it reads the op table by the length that it was compiled with.";
    Build gate => "config-examples" config::examples: "each example builds, agrees with its tensors and runs on shapes",
        "Run `dylm check FILE --only config-examples` after each change; op errors name the line of your source.";
    Build => "config-no-config" config::no_config: "a text that is no configuration is refused with one sentence",
        "Declare the keys with config!, or return an error instead of unwrapping.";
    Build => "config-missing-keys" config::missing_keys: "with any key left out it builds, or says what is missing",
        "Give the key a default, or leave it without one and config! asks for it by name.";
    Build => "config-null-keys" config::null_keys: "with any key null it builds, or says what is missing",
        "null is as good as absent: config! reads it so.";
    Build => "config-wrong-types" config::wrong_types: "with any value of another type it builds, or says what it should be",
        "Read keys by config!, which knows types; do not unwrap.";
    Build => "config-extremes" config::extreme_numbers: "with any number 0, negative, huge or a fraction it builds, or says why not",
        "Bound divisors: `num_attention_heads: usize where >= 1`. Subtract with checked_sub. Let the host multiply shapes.";
    Build => "config-fuzz" config::fuzz: "changed at random it builds, or says why not, in bounded time and memory",
        "The message has the case and the seed; the same --seed tries the same.";
    Build => "build-repeats" build::same_twice: "two models of one configuration ask for the same tensors",
        "`new` must follow from the configuration alone: no statics, no counters, no clock.";
    Build => "build-missing" build::missing: "a tensor that is not there is reported by its name",
        "Ask for a tensor by name and let the host report it; look with `has` only where layouts differ.";
    Build => "build-misshapen" build::misshapen: "a tensor of another shape is reported by its name",
        "State the shape that the configuration gives, and let the host compare.";
    Build => "build-unused" build::nothing_unused: "every tensor is used, and a strange one is reported",
        "`ignore` only what the architecture has and does not need, by its full prefix.";
    Build => "shapes-logits" shapes::logits: "for any count of tokens, logits are [tokens, vocabulary]",
        "`forward` keeps the tokens' axis first; `head` gives a row for each row.";
    Build => "shapes-caches-constant" shapes::caches_constant: "caches() says the same each time",
        "Caches follow from the configuration; compute them in `new`.";
    Build => "shapes-caches-used" shapes::caches_used: "every declared cache is used in each step",
        "Declare a cache for each layer that attends or recurs, in the order of Step::layers, and none for the others.";
    Build => "shapes-counts" shapes::replay_counts: "other counts of tokens give the same ops",
        "`forward` cannot know how many tokens there are; do not let it depend on anything but `new`.";
    Run => "replay-values" shapes::replay_values: "equal counts give equal ops, whatever the tokens and positions are",
        "Keep nothing between calls: no counter, no clock, no static. What a layer must remember is a Cache.";
    Run gate => "numerics-finite" numerics::is_finite: "every logit is a number",
        "Look for a division by what may be 0, a logarithm, a missing norm, a mask of infinities.";
    Run => "numerics-repeats" numerics::repeatable: "the same text gives the same bits",
        "Keep nothing between calls, and use no random numbers.";
    Run => "numerics-causal" numerics::causal: "logits follow from the tokens so far, and from no later one",
        "Mix tokens only by attend and the recurrent ops, which know their order.";
    Run => "numerics-quantized" numerics::quantized: "weights in 4 bits give what their numbers give",
        "Use linear layers and embeddings for matrices, not parameters with matmul.";
    Run => "numerics-plain-ops" numerics::by_plain_ops: "the ops that run on GPUs give the same",
        "Probably a mistake of dylm: please report it with the example's config.json.";
    Run => "numerics-reference" numerics::reference: "a real model's logits are those of --reference",
        "Compare layer by layer with the other program; start with one layer and one token.";
    Run => "caches-chunked" caches::chunked: "a text in chunks gives the logits of the whole",
        "Positions and masks are the host's: use rotate and attend, and keep nothing between calls.";
    Run => "caches-singly" caches::singly: "so do single tokens, and steps of none change nothing",
        "Positions and masks are the host's: use rotate and attend, and keep nothing between calls.";
    Run => "caches-batched" caches::batched: "sequences in one step give what each gives alone",
        "Tokens of several sequences share the first axis: fold over the last axis only.";
    Run => "caches-trimmed" caches::trimmed: "a text taken back and read again gives the same",
        "What a layer must remember is a Cache; nothing else may remember.";
    Run => "caches-saved" caches::saved: "a text saved in a prompt cache and read on gives the same",
        "What a layer must remember is a Cache; nothing else may remember.";
    Run => "caches-limited" caches::limited: "within --max-kv-size the model goes on",
        "Windows are the host's: state them in the Cache and in attend.";
    Run => "threads-parallel" threads::at_once: "models on several threads do not touch each other",
        "Share nothing between models: no statics that change.";
    Build => "threads-building" threads::built_at_once: "models can be built on several threads at once",
        "Share nothing between models: no statics that change.";
    Run => "threads-handed-over" threads::handed_over: "a model is built, run and dropped on different threads",
        "Keep nothing in thread-local variables.";
    Run => "threads-ops" threads::ops_stay: "ops are called on the thread of the call, during the call",
        "Start no threads for ops: the host runs each op on as many as there are.";
    Build => "errors-passed-on" errors::passed_on: "a failed tensor comes back with its first failure",
        "Errors stick by themselves; return the tensor that you were given, or one made from it.";
    Run => "errors-undone" errors::step_undone: "after a failed step the next gives what it would have given",
        "Keep nothing between calls.";
    Run => "errors-drop" errors::dropped: "a model can be dropped after anything, without a panic",
        "Let Drop do nothing that can fail.";
    Run => "errors-panics" errors::no_hidden_panic: "no thread of the plugin panics, caught or not",
        "Return an error, or Tensor::failed, where something may go wrong.";
    Run => "resources-handles" resources::handles: "every tensor is released at the end of a call, once",
        "Do not forget, leak or copy a Tensor; in C, release each handle exactly once.";
    Build => "resources-models" resources::memory_of_models: "a dropped model gives its memory back",
        "Look for Box::leak, mem::forget, cycles of Rc, and for what drop does not reach.";
    Build => "resources-steps" resources::memory_of_steps: "a step leaves no memory behind",
        "Look for a list that grows with each call.";
    Run => "resources-files" resources::files: "no file is left open",
        "Architectures read no files: what they need is in config.json and the checkpoint.";
    Run => "resources-threads" resources::no_threads: "no thread is left running",
        "Start no threads.";
    Run => "resources-silent" resources::silent: "nothing is printed",
        "Remove println!, dbg! and eprintln!: standard output belongs to what the model says.";
}

/// The test of this name.
pub fn find(name: &str) -> Option<&'static Test> {
    TESTS.iter().find(|test| test.name == name)
}

/// The hidden command of the child: runs the job in this folder and writes what came of it there.
pub fn child(folder: &Path) -> Result<()> {
    let path = folder.join(sandbox::JOB);
    let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
    let job: Job = serde_json::from_str(&text).map_err(|e| Error::Usage(format!("{}: {e}", path.display())))?;
    let test = find(&job.test).ok_or_else(|| Error::Usage(format!("there is no test {:?}", job.test)))?;
    let place = folder.join(sandbox::PLACE);
    let place = File::create(&place).map_err(Error::io(&place))?;
    sandbox::limit_memory(job.memory);
    let (verdict, reason) = match (test.run)(&Subject::new(job, place)) {
        Ok(saw) => (Verdict::Pass, saw),
        Err(Stop::Skip(why)) => (Verdict::Skip, why),
        Err(Stop::Fail(why)) => (Verdict::Fail, why),
    };
    let report = Report { verdict, reason, milliseconds: 0 };
    sandbox::tell(folder, &serde_json::to_string(&report).unwrap_or_default())
}

/// Runs one test in a process of its own.
pub fn run(test: &Test, job: &Job, time: Duration) -> Report {
    let job = Job { test: test.name.to_owned(), ..job.clone() };
    let ended = match sandbox::run(COMMAND, &serde_json::to_string(&job).unwrap_or_default(), time) {
        Ok(ended) => ended,
        Err(e) => {
            return Report { verdict: Verdict::Fail, reason: format!("could not be tried: {e}"), milliseconds: 0 };
        }
    };
    let milliseconds = ended.took.as_millis() as u64;
    let told = ended.result.as_deref().filter(|_| ended.status.is_some_and(|status| status.success()));
    let report = told.and_then(|text| serde_json::from_str::<Report>(text).ok());
    let Some(mut report) = report else {
        let at = if ended.place.is_empty() { String::new() } else { format!("{}: ", ended.place) };
        return Report { verdict: Verdict::Fail, reason: format!("{at}{}", ended.end()), milliseconds };
    };
    report.milliseconds = milliseconds;
    let said = [ended.stdout.trim(), ended.stderr.trim()].into_iter().find(|text| !text.is_empty());
    if let (Some(said), "resources-silent", Verdict::Pass) = (said, test.name, report.verdict) {
        let said: String = said.chars().take(80).collect();
        report = Report { verdict: Verdict::Fail, reason: format!("it printed {said:?}"), milliseconds };
    }
    report
}

/// The hidden command of [`child`].
pub const COMMAND: &str = "check-child";
