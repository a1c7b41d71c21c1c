//! A name -> a crate of one's own that builds, speaks and is tested: `dylm new-plugin`.
//!
//! Everything in it comes out of the binary, plugin-api too: an author needs no copy of dylm's sources, no network but cargo's, and has the
//! very words and ABI that this dylm was built with.

mod archive;
pub mod model;
pub mod names;

use crate::{
    error::{Error, Result},
    tiny::{self, WeightDtype},
};
use archive::Archive;
use std::{env::consts, fs, path::PathBuf};

/// What to write.
#[derive(Clone, Debug)]
pub struct Scaffold {
    /// The model_type that the plugin will serve.
    pub name: String,
    /// A plugin of dylm's, or a model_type of one, to begin with; `None` is a llama without variants.
    pub from: Option<String>,
    /// The folder to make.
    pub folder: PathBuf,
    /// plugin-api's folder, where the one in the binary is not wanted.
    pub plugin_api: Option<PathBuf>,
}

/// What the template says with its tiny checkpoint, and what with ReLU in place of SiLU: the same on every machine.
const SAYS: [&str; 2] = ["mY:w:vv5YY: b", "[Nn] fYfy90Y9"];

impl Scaffold {
    /// Writes the crate. The folder must not be there yet.
    ///
    /// # Errors
    /// One sentence: a name that is none, a folder that exists, a plugin to begin with that dylm does not have.
    pub fn write(&self) -> Result<()> {
        names::check(&self.name)?;
        let mut archive = Archive::open()?;
        let source = self.source(&mut archive)?;
        if self.folder.symlink_metadata().is_ok() {
            return Err(Error::Usage(format!(
                "{}: is there already; name another folder with --path, or remove it",
                self.folder.display()
            )));
        }
        self.write_checkpoint(&mut archive, &source)?;
        for (file, text) in &source.files {
            self.put(&format!("src/{file}"), text)?;
        }
        let plugin_api = match &self.plugin_api {
            Some(path) => path.canonicalize().map_err(Error::io(path))?.display().to_string(),
            None => {
                for name in archive.names("plugin-api/") {
                    self.put(&name, &archive.text(&name)?)?;
                }
                "plugin-api".into()
            }
        };
        let first_change = match source.from {
            None => archive.text("template/first_change.md")?,
            Some(_) => String::new(),
        };
        let size = fs::metadata(self.folder.join("tiny/model.safetensors")).map_or(0, |m| m.len());
        let words = [
            ("{{first_change}}", first_change.trim_end()),
            ("{{says}}\n", &if source.from.is_none() { format!("{}\n", SAYS[0]) } else { String::new() }),
            ("{{says_then}}", SAYS[1]),
            ("{{name}}", &self.name),
            ("{{crate}}", &names::of_crate(&self.name)),
            ("{{Type}}", &names::of_type(&self.name)),
            ("{{library}}", &self.library()),
            ("{{plugin_api}}", &plugin_api),
            ("{{from_flag}}", &source.from.as_ref().map(|from| format!(" --from {from}")).unwrap_or_default()),
            ("{{tiny_size}}", &format!("{} KB", size.div_ceil(1000))),
            ("{{version}}", env!("CARGO_PKG_VERSION")),
        ];
        for (template, file) in [
            ("manifest.toml", "Cargo.toml"),
            ("README.md", "README.md"),
            ("test.rs", "tests/tiny.rs"),
            ("gitignore", ".gitignore"),
            ("rustfmt.toml", "rustfmt.toml"),
            ("ci.yml", ".github/workflows/ci.yml"),
        ] {
            self.put(file, &fill(archive.text(&format!("template/{template}"))?, &words))?;
        }
        if self.plugin_api.is_none() {
            self.put("Cargo.lock", &lock(&archive.text("Cargo.lock")?, &names::of_crate(&self.name)))?;
        }
        Ok(())
    }

    /// The library that the crate builds.
    pub fn library(&self) -> String {
        format!("{}{}{}", consts::DLL_PREFIX, names::of_crate(&self.name), consts::DLL_SUFFIX)
    }

    fn put(&self, file: &str, text: &str) -> Result<()> {
        let path = self.folder.join(file);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(Error::io(parent))?;
        }
        fs::write(&path, text).map_err(Error::io(&path))
    }

    /// config.json, weights and tokenizer in `tiny/`.
    fn write_checkpoint(&self, archive: &mut Archive, source: &Source) -> Result<()> {
        let out = self.folder.join("tiny");
        fs::create_dir_all(&out).map_err(Error::io(&out))?;
        let config = archive.text(&format!("{}/config.json", source.tiny))?;
        let damaged = |e: serde_json::Error| Error::Config(format!("the {} in this dylm: {e}", source.tiny));
        let mut config: serde_json::Value = serde_json::from_str(&config).map_err(damaged)?;
        tiny::tokenizer::write(&config, &out)?;
        rename_type(&mut config, &source.model_type, &self.name);
        self.put("tiny/config.json", &format!("{config:#}\n"))?;
        let tensors = tiny::Checkpoint::parse(&archive.text(&format!("{}/tensors.json", source.tiny))?)?;
        tensors.write(&out.join("model.safetensors"), WeightDtype::F32)
    }

    fn source(&self, archive: &mut Archive) -> Result<Source> {
        let Some(from) = &self.from else {
            let lib = archive.text("template/lib.rs")?;
            let lib = fill(lib, &[("{{name}}", &self.name), ("{{Type}}", &names::of_type(&self.name))]);
            let files = vec![("lib.rs".into(), lib)];
            return Ok(Source { from: None, model_type: "llama".into(), tiny: "template/tiny".into(), files });
        };
        let (model_type, plugin) = archive.find(from)?;
        let folder = format!("plugins/{plugin}/");
        let mut files = Vec::new();
        for name in archive.names(&folder) {
            let text = archive.text(&name)?.replace(&format!("\"{model_type}\""), &format!("\"{}\"", self.name));
            files.push((name[folder.len()..].to_owned(), serve_one(text, &self.name)));
        }
        Ok(Source { from: Some(from.clone()), tiny: format!("tiny/{model_type}"), model_type, files })
    }
}

/// What a crate begins with.
struct Source {
    from: Option<String>,
    /// The model_type whose place the new one takes.
    model_type: String,
    /// The folder of its tiny checkpoint.
    tiny: String,
    /// Files of `src/`.
    files: Vec<(String, String)>,
}

/// The list of model_types, of whatever length, becomes one of the new type alone, and the example the one in `tiny/`.
fn serve_one(text: String, name: &str) -> String {
    let types = ("const MODEL_TYPES: &'static [&'static str] =", "];", format!(" &[\"{name}\"];"));
    let examples = (", examples = [", "]);", "\"tiny/config.json\"]);".to_owned());
    [types, examples].into_iter().fold(text, |text, (start, end, new)| {
        let around = text.split_once(start).and_then(|(before, rest)| Some((before, rest.split_once(end)?.1)));
        match around {
            Some((before, after)) => format!("{before}{start}{new}{after}"),
            None => text,
        }
    })
}

/// The type itself, also where a wrapper's text model has the same.
fn rename_type(config: &mut serde_json::Value, from: &str, to: &str) {
    let Some(map) = config.as_object_mut() else { return };
    for (key, value) in map {
        if key == "model_type" && value == from {
            *value = to.into();
        }
        rename_type(value, from, to);
    }
}

fn fill(text: String, words: &[(&str, &str)]) -> String {
    words.iter().fold(text, |text, (mark, word)| text.replace(mark, word))
}

/// Cargo.lock of the crate: what plugin-api needs, and the crate itself in its place of the alphabet.
fn lock(of_plugin_api: &str, name: &str) -> String {
    const START: &str = "[[package]]\n";
    let own = format!("name = \"{name}\"\nversion = \"0.1.0\"\ndependencies = [\n \"plugin-api\",\n]");
    let mut parts = of_plugin_api.split(START).map(str::trim_end);
    let head = parts.next().unwrap_or_default();
    let mut packages: Vec<&str> = parts.chain([own.as_str()]).collect();
    packages.sort_by_key(|package| package.lines().next().unwrap_or_default());
    let packages: Vec<String> = packages.iter().map(|package| format!("{START}{package}\n")).collect();
    format!("{head}\n\n{}", packages.join("\n"))
}
