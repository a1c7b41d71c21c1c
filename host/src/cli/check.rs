//! `dylm check FILE|NAME`: tries a plugin out and tells its author what to mend. Every test runs in a process of its own, so this command
//! is safe with a plugin that crashes; it runs the plugin's code, so it is not for files that one would not open at all.

use super::{
    Done,
    printing::{Paint, json, line},
};
use crate::{
    error::{Error, Result},
    plugin::{
        check::{
            catalog::{self, Report, Stage, TESTS, Test, Verdict},
            subject::Job,
        },
        file::PluginFile,
        registry::{Registry, file_stem},
        trust::{Standing, pins::Pins},
    },
};
use clap::Args;
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

/// Flags of `dylm check`.
#[derive(Args)]
#[command(after_help = "\
Each test runs in a process of its own, with a limit of time and memory: a plugin that panics, loops, exits or overflows its stack
fails that test and no more. Models are built from the small configurations that the plugin carries,
`export_plugin!(Llama, examples = [\"config.json\"])`, and from those of --config, on weights made up from the seed: no model is
fetched. Tests whose ground is missing (a file that does not open, an example that does not build) are skipped.

  dylm check llama                              an installed plugin, by model_type or by the name of its file
  dylm check target/debug/libmine.so            one that you have just built
  dylm check mine --only config,caches-trimmed  some tests: by name, or all that begin so
  dylm check mine --only config-fuzz --seed 7 --cases 10000
  dylm check mine --only numerics-reference --model ./my-model --reference logits.safetensors
                                                against another program: input_ids [n], logits [n, vocab] in f32, as
                                                safetensors.torch.save_file writes them

Exits with 0 where all tests pass, 1 where one fails, 2 where the command is wrong.")]
pub struct Check {
    /// A library's file, or the model_type or name of a plugin on the search path
    #[arg(value_name = "FILE|NAME", required_unless_present = "list")]
    plugin: Option<String>,
    /// Folder with plugins, searched before all others (may be repeated)
    #[arg(long, value_name = "DIR")]
    plugins: Vec<PathBuf>,
    /// Run these tests alone: names, or what names begin with
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// List the tests and what each means, and run none
    #[arg(long)]
    list: bool,
    /// A config.json to try beside the plugin's own examples (may be repeated)
    #[arg(long, value_name = "FILE")]
    config: Vec<PathBuf>,
    /// Where all that is random comes from: weights, texts, changes to configurations
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Random changes to each configuration, for config-fuzz
    #[arg(long, default_value_t = 300)]
    cases: usize,
    /// Seconds that a test may take
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
    /// MiB that a test may ask for
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    memory: u64,
    /// Logits of another program, for numerics-reference
    #[arg(long, value_name = "FILE", requires = "model")]
    reference: Option<PathBuf>,
    /// The model that --reference is of
    #[arg(long, value_name = "MODEL", requires = "reference")]
    model: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Check {
    /// Runs the command.
    pub fn run(&self) -> Done {
        let chosen = self.chosen()?;
        let Some(plugin) = self.plugin.as_deref().filter(|_| !self.list) else { return self.show_list(&chosen) };
        let file = self.file(plugin)?;
        let absolute =
            |path: &PathBuf| path.canonicalize().map_err(|e| Error::Usage(format!("{}: {e}", path.display())));
        let job = Job {
            test: String::new(),
            plugin: file.clone(),
            configs: self.config.iter().map(absolute).collect::<Result<_>>()?,
            seed: self.seed,
            cases: self.cases,
            memory: self.memory << 20,
            reference: self.reference.as_ref().map(absolute).transpose()?,
            model: self.model.clone(),
        };
        let reports = self.try_all(&chosen, &job);
        let failed = chosen.iter().zip(&reports).filter(|(_, report)| report.verdict == Verdict::Fail);
        let failed: Vec<(&Test, &Report)> = failed.map(|(test, report)| (*test, report)).collect();
        if self.json {
            let one = |(test, report): (&&Test, &Report)| {
                json!({ "name": test.name, "what": test.what, "verdict": report.verdict, "reason": report.reason,
                        "milliseconds": report.milliseconds })
            };
            let tests: Vec<Value> = chosen.iter().zip(&reports).map(one).collect();
            json(&json!({ "plugin": file, "seed": self.seed, "failed": failed.len(), "tests": tests }))?;
        } else {
            self.tell(&chosen, &reports, &failed, plugin)?;
        }
        Ok(if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    fn chosen(&self) -> Result<Vec<&'static Test>> {
        let fits = |test: &Test, only: &str| {
            test.name.strip_prefix(only).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
        };
        if let Some(none) = self.only.iter().find(|only| !TESTS.iter().any(|test| fits(test, only))) {
            return Err(Error::Usage(format!("--only {none}: there is no such test; --list has all of them")));
        }
        let all = |test: &&Test| self.only.is_empty() || self.only.iter().any(|only| fits(test, only));
        Ok(TESTS.iter().filter(all).collect())
    }

    /// The file that is meant: a path, or what the search path has.
    fn file(&self, plugin: &str) -> Result<PathBuf> {
        let path = Path::new(plugin);
        if path.components().count() > 1 || plugin.ends_with(std::env::consts::DLL_SUFFIX) {
            return path.canonicalize().map_err(|e| Error::Usage(format!("{plugin}: {e}")));
        }
        let file = self.find(plugin)?;
        // A name stands for whatever lies on the search path; to name the file itself is to say that it may run.
        let hash = || PluginFile::open(&file)?.sha256();
        match Standing::of(&file, hash, Pins::read)? {
            Standing::BuiltIn | Standing::Trusted(_) => Ok(file),
            Standing::Unknown | Standing::Changed(_) => Err(Error::Usage(format!(
                "{plugin}: is {}, which is not dylm's own and not trusted; to run it all the same, name the file",
                file.display()
            ))),
        }
    }

    /// The plugin of this name on the search path.
    fn find(&self, plugin: &str) -> Result<PathBuf> {
        let registry = Registry::new(&self.plugins);
        let name = format!("{}{}{}", std::env::consts::DLL_PREFIX, file_stem(plugin), std::env::consts::DLL_SUFFIX);
        // By its file first: a plugin that is refused for what it says is checked as well.
        match registry.folders().iter().map(|folder| folder.join(&name)).find(|file| file.is_file()) {
            Some(file) => Ok(file),
            None => registry.resolve(plugin).map(|found| found.path).map_err(|e| Error::Usage(e.to_string())),
        }
    }

    fn show_list(&self, chosen: &[&Test]) -> Done {
        if self.json {
            let one = |test: &&Test| json!({ "name": test.name, "what": test.what });
            json(&chosen.iter().map(one).collect())?;
        } else {
            chosen.iter().try_for_each(|test| line(format!("{:24} {}", test.name, test.what)))?;
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Stage by stage; in a stage, as many at once as there are processors.
    fn try_all(&self, chosen: &[&'static Test], job: &Job) -> Vec<Report> {
        let time = Duration::from_secs(self.timeout.max(1));
        let reports = Mutex::new(BTreeMap::<&str, Report>::new());
        let mut missing: Option<&str> = None;
        for stage in [Stage::File, Stage::Open, Stage::Build, Stage::Run] {
            // The gates first: what stands on them need not wait for their failing again and again.
            for gates in [true, false] {
                let now: Vec<&Test> = chosen.iter().copied().filter(|t| t.stage == stage && t.gate == gates).collect();
                if let Some(ground) = missing {
                    let skip = Report { verdict: Verdict::Skip, reason: format!("{ground} fails"), milliseconds: 0 };
                    let mut reports = reports.lock().unwrap_or_else(PoisonError::into_inner);
                    // A test of the file needs no ground.
                    now.iter().filter(|_| stage > Stage::File).for_each(|t| drop(reports.insert(t.name, skip.clone())));
                    if stage > Stage::File {
                        continue;
                    }
                }
                let next = AtomicUsize::new(0);
                let work = || {
                    while let Some(test) = now.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let report = catalog::run(test, job, time);
                        reports.lock().unwrap_or_else(PoisonError::into_inner).insert(test.name, report);
                    }
                };
                let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(now.len()).min(8);
                std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
                let reports = reports.lock().unwrap_or_else(PoisonError::into_inner);
                let fails = |test: &&&Test| reports.get(test.name).is_some_and(|r| r.verdict == Verdict::Fail);
                missing = missing.or_else(|| now.iter().find(|test| test.gate && fails(test)).map(|test| test.name));
            }
        }
        let mut reports = reports.into_inner().unwrap_or_else(PoisonError::into_inner);
        let none = || Report { verdict: Verdict::Skip, reason: "was not tried".into(), milliseconds: 0 };
        chosen.iter().map(|test| reports.remove(test.name).unwrap_or_else(none)).collect()
    }

    fn tell(&self, chosen: &[&Test], reports: &[Report], failed: &[(&Test, &Report)], plugin: &str) -> Result<()> {
        for (test, report) in chosen.iter().zip(reports) {
            let word = match report.verdict {
                Verdict::Pass => "pass".to_owned(),
                Verdict::Fail => Paint::Red.out("FAIL"),
                Verdict::Skip => Paint::Dim.out("skip"),
            };
            line(format!("{word}  {:24} {}", test.name, report.reason.lines().next().unwrap_or_default()).trim_end())?;
        }
        let skipped = reports.iter().filter(|report| report.verdict == Verdict::Skip).count();
        let passed = reports.len() - skipped - failed.len();
        line(format!("\n{passed} passed, {} failed, {skipped} skipped", failed.len()))?;
        if !cfg!(any(target_os = "linux", target_os = "android")) {
            line("This system limits no memory: tests were limited in time only.")?;
        }
        for (test, report) in failed {
            let again = self.again(plugin, test);
            line(format!(
                "\n{}\n  expected  {}\n  found     {}\n  mend      {}\n  again     {again}",
                Paint::Bold.out(test.name),
                test.what,
                report.reason.replace('\n', "\n            "),
                test.mend,
            ))?;
        }
        Ok(())
    }

    /// The command that tries one test as it was tried.
    fn again(&self, plugin: &str, test: &Test) -> String {
        let mut words = vec![format!("dylm check {plugin} --only {}", test.name)];
        words.extend(self.plugins.iter().map(|folder| format!("--plugins {}", folder.display())));
        words.extend(self.config.iter().map(|path| format!("--config {}", path.display())));
        words.extend((test.name == "config-fuzz").then(|| format!("--cases {}", self.cases)));
        if let (Some(file), Some(model), "numerics-reference") = (&self.reference, &self.model, test.name) {
            words.push(format!("--reference {} --model {model}", file.display()));
        }
        words.push(format!("--seed {}", self.seed));
        words.join(" ")
    }
}

/// The hidden command that runs one test, for `check` alone.
#[derive(Args)]
pub struct Child {
    folder: PathBuf,
}

impl Child {
    /// Runs the command.
    pub fn run(&self) -> Done {
        catalog::child(&self.folder).map(|()| ExitCode::SUCCESS)
    }
}
