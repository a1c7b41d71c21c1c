//! Packs what `dylm new-plugin` writes into one archive that becomes part of the binary: plugin-api (with a manifest that needs no
//! workspace), the sources of all plugins, a tiny checkpoint for each model type, and the versions of Cargo.lock.
//!
//! A crate made from an installed dylm then needs no network, and speaks the very ABI of the dylm that made it.
//! With the feature `cuda` it also compiles the kernels for NVIDIA's GPUs.

use std::{
    collections::BTreeMap,
    env, fs,
    io::{self, Cursor, Write},
    path::{Path, PathBuf},
};

type Files = BTreeMap<String, String>;

fn main() -> io::Result<()> {
    let host = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let root = host.parent().unwrap_or(&host);
    for watched in ["host/build.rs", "host/scaffold", "plugin-api", "Cargo.lock", "Cargo.toml", "rustfmt.toml"] {
        println!("cargo:rerun-if-changed={}", root.join(watched).display());
    }
    // Who works on a plugin need not build the host anew each time; what is handed out must be today's.
    if env::var("PROFILE").as_deref() == Ok("release") {
        for watched in ["plugins", "tests/fixtures/tiny"] {
            println!("cargo:rerun-if-changed={}", root.join(watched).display());
        }
    }
    let mut files = Files::new();
    let manifest = fs::read_to_string(root.join("Cargo.toml"))?;
    add(&mut files, &host.join("scaffold"), "template")?;
    add_plugin_api(&mut files, root, &manifest)?;
    add_plugins(&mut files, root)?;
    files.insert("template/rustfmt.toml".into(), fs::read_to_string(root.join("rustfmt.toml"))?);
    files.insert("Cargo.lock".into(), lock(&fs::read_to_string(root.join("Cargo.lock"))?, "plugin-api"));
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    fs::write(out.join("scaffold.zip"), archive(&files)?)?;
    if env::var_os("CARGO_FEATURE_CUDA").is_some() { cuda(&host.join("src/kernels/cuda"), &out) } else { Ok(()) }
}

/// Compiles every .cu file of `folder`, and writes the list of them that the host includes.
fn cuda(folder: &Path, out: &Path) -> io::Result<()> {
    for name in ["CUDA_HOME", "CUDA_PATH", "PATH"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].map(|name| env::var_os(name).map(PathBuf::from));
    let homes = homes.into_iter().flatten().chain([PathBuf::from("/usr/local/cuda")]);
    let nvcc = homes.map(|home| home.join("bin/nvcc")).find(|nvcc| nvcc.is_file()).unwrap_or_else(|| "nvcc".into());
    let mut sources: Vec<PathBuf> = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
    sources.retain(|path| path.extension().is_some_and(|e| e == "cu" || e == "cuh"));
    // Not the folder: the Rust beside them changes more often. A new kernel comes with a new line in mod.rs.
    for watched in sources.iter().chain([&folder.join("mod.rs")]) {
        println!("cargo:rerun-if-changed={}", watched.display());
    }
    let changed = |path: &Path| fs::metadata(path)?.modified();
    let headers = sources.iter().filter(|path| path.extension().is_some_and(|e| e == "cuh"));
    let headers = headers.map(|path| changed(path)).collect::<io::Result<Vec<_>>>()?.into_iter().max();
    sources.retain(|path| path.extension().is_some_and(|e| e == "cu"));
    sources.sort();
    let mut list = String::from(
        "#[repr(align(16))]\nstruct Image<const N: usize>([u8; N]);\nstruct Bytes(&'static [u8]);\nstatic PROGRAMS: &[(&str, Bytes)] = &[\n",
    );
    let missing = |e| {
        let what = "--features cuda needs NVIDIA's nvcc: install the CUDA toolkit or set CUDA_HOME";
        io::Error::other(format!("{}: {e}; {what}", nvcc.display()))
    };
    // Machine code for Hopper; for any other GPU from Ampere on, PTX that its driver compiles.
    let targets = ["-gencode=arch=compute_90,code=sm_90", "-gencode=arch=compute_80,code=compute_80"];
    // Instructions that later GPUs no longer have.
    let hopper = ["-gencode=arch=compute_90a,code=sm_90a"];
    let mut compilers = Vec::new();
    for source in sources {
        let name = source.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let image = out.join(format!("{name}.fatbin"));
        list += &format!("({name:?}, Bytes(&Image(*include_bytes!({:?})).0)),\n", image.display().to_string());
        // A kernel takes nvcc up to a minute: what has not changed is not compiled again.
        let newest = headers.max(Some(changed(&source)?));
        if changed(&image).is_ok_and(|image| Some(image) > newest) && changed(&nvcc).ok() < changed(&image).ok() {
            continue;
        }
        let mut command = std::process::Command::new(&nvcc);
        let targets = if name.ends_with("_hopper") { &hopper[..] } else { &targets[..] };
        command.args(["-std=c++17", "-O3", "-fatbin"]).args(targets).arg("-o").arg(&image).arg(&source);
        compilers.push((source, image, command.spawn().map_err(missing)?));
    }
    // All at once: a few files, of which two take most of the time.
    for (source, image, mut compiler) in compilers {
        if !compiler.wait()?.success() {
            // Half of one is not to pass for fresh.
            let _ = fs::remove_file(image);
            return Err(io::Error::other(format!("nvcc cannot compile {}", source.display())));
        }
    }
    fs::write(out.join("cuda_programs.rs"), list + "];\n")
}

/// Every text of `folder`, named from `to`.
fn add(files: &mut Files, folder: &Path, to: &str) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match path.is_dir() {
            // What only dylm's own tests read.
            true if !["target", "tests", "benches", "examples"].contains(&&*name) => {
                add(files, &path, &format!("{to}/{name}"))?
            }
            false if !name.starts_with('.') => {
                files.insert(format!("{to}/{name}"), fs::read_to_string(&path)?);
            }
            _ => {}
        }
    }
    Ok(())
}

fn add_plugin_api(files: &mut Files, root: &Path, manifest: &str) -> io::Result<()> {
    add(files, &root.join("plugin-api"), "plugin-api")?;
    if let Some(own) = files.get_mut("plugin-api/Cargo.toml") {
        *own = standalone(own, manifest);
    }
    for licence in ["LICENSE-APACHE", "LICENSE-MIT"] {
        files.insert(format!("plugin-api/{licence}"), fs::read_to_string(root.join(licence))?);
    }
    Ok(())
}

/// A manifest with what it takes from the workspace written out, and without what only the workspace has use for.
fn standalone(manifest: &str, workspace: &str) -> String {
    let value = |section: &str, key: &str| {
        let after = workspace.split_once(&format!("[workspace.{section}]\n")).map_or("", |(_, after)| after);
        let lines = after.lines().take_while(|line| !line.starts_with('['));
        lines.filter_map(|line| line.split_once(" = ")).find(|(k, _)| *k == key).map(|(_, value)| value.to_owned())
    };
    let (mut text, mut section) = (String::new(), "");
    for line in manifest.lines() {
        if let Some(name) = line.strip_prefix('[') {
            section = name.trim_end_matches(']');
        }
        if matches!(section, "lints" | "dev-dependencies") {
            continue;
        }
        let inherited = line.strip_suffix(".workspace = true").and_then(|key| {
            let from = if section == "package" { "package" } else { "dependencies" };
            Some(format!("{key} = {}", value(from, key)?))
        });
        text += inherited.as_deref().unwrap_or(line);
        text.push('\n');
    }
    text.trim_end().to_owned() + "\n"
}

/// `plugins/NAME/FILE`, `tiny/MODEL_TYPE/{config,tensors}.json`, and `types`: a line `MODEL_TYPE NAME` for each that has both.
fn add_plugins(files: &mut Files, root: &Path) -> io::Result<()> {
    let tiny = root.join("tests/fixtures/tiny");
    let mut types = String::new();
    for entry in fs::read_dir(root.join("plugins"))? {
        let folder = entry?.path();
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Ok(source) = fs::read_to_string(folder.join("src/lib.rs")) else { continue };
        add(files, &folder.join("src"), &format!("plugins/{name}"))?;
        let list = source.split_once("MODEL_TYPES").and_then(|(_, rest)| rest.split_once('=')?.1.split_once(']'));
        for model_type in list.map_or("", |(list, _)| list).split('"').skip(1).step_by(2) {
            // As the Hub has it, or as mlx-lm does.
            let named = [model_type.to_owned(), format!("{model_type}-mlx")];
            let Some(tiny) = named.iter().map(|n| tiny.join(n)).find(|f| f.join("tensors.json").is_file()) else {
                continue;
            };
            for file in ["config.json", "tensors.json"] {
                files.insert(format!("tiny/{model_type}/{file}"), fs::read_to_string(tiny.join(file))?);
            }
            types += &format!("{model_type} {name}\n");
        }
    }
    files.insert("types".into(), types);
    Ok(())
}

/// The part of a Cargo.lock that `package` needs.
fn lock(whole: &str, package: &str) -> String {
    let (head, blocks) = whole.split_once("[[package]]\n").unwrap_or((whole, ""));
    let blocks: Vec<&str> = blocks.split("[[package]]\n").map(str::trim_end).collect();
    let field = |block: &str, key: &str| {
        let line = block.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(" = "));
        line.map(|value| value.trim_matches('"').to_owned()).unwrap_or_default()
    };
    let (mut wanted, mut kept) = (vec![package.to_owned()], BTreeMap::new());
    while let Some(one) = wanted.pop() {
        // A dependency is called by its name, with its version where the name alone would not do.
        let (name, version) = one.split_once(' ').unwrap_or((&one, ""));
        let is_it =
            |block: &&&str| field(block, "name") == name && (version.is_empty() || field(block, "version") == version);
        let Some(block) = blocks.iter().find(is_it) else { continue };
        if kept.insert((name.to_owned(), field(block, "version")), *block).is_none() {
            let listed = block.split_once("dependencies = [").map_or("", |(_, list)| list);
            wanted.extend(listed.split('"').skip(1).step_by(2).map(str::to_owned));
        }
    }
    // Written as cargo would write it, which with --locked would refuse anything else: a version only where a name has two.
    let once = |name: &str| kept.keys().filter(|(other, _)| other == name).count() == 1;
    let plain = |line: &str| match line.trim().trim_matches(['"', ',']).split_once(' ') {
        Some((name, _)) if line.starts_with(" \"") && once(name) => format!(" \"{name}\","),
        _ => line.to_owned(),
    };
    let blocks = kept.values().map(|block| block.lines().map(plain).collect::<Vec<_>>().join("\n"));
    let blocks: Vec<String> = blocks.map(|block| format!("[[package]]\n{block}\n")).collect();
    format!("{head}{}", blocks.join("\n"))
}

fn archive(files: &Files) -> io::Result<Vec<u8>> {
    let mut archive = zip::ZipWriter::new(Cursor::new(Vec::new()));
    // A time of its own would make two builds of the same sources differ.
    let options = zip::write::SimpleFileOptions::default().last_modified_time(zip::DateTime::default());
    for (name, text) in files {
        archive.start_file(name.as_str(), options)?;
        archive.write_all(text.as_bytes())?;
    }
    Ok(archive.finish()?.into_inner())
}
