//! Plays dylm's Metal kernels without a GPU: a C++ compiler takes their text as it is, behind `metal/stage.h`, and the program that it makes
//! runs launches that come through a pipe. Every launch is played twice, its threads once forwards and once backwards: a kernel that
//! forgets a barrier gives something else then.

use candle_core::DType;
use dylm::{
    device::{DeviceChoice, DtypeChoice, Placement},
    kernels::metal::launch::{Kernel, Launch, program},
};
use std::{
    collections::{HashMap, HashSet},
    env, fs,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
};

/// Kernels in one program: compilers are slow, and two work at once.
const TOGETHER: usize = 24;

fn compiler() -> String {
    env::var("CXX").unwrap_or_else(|_| "c++".into())
}

/// Where kernels run: on macOS the GPU, elsewhere the stage, on the CPU by candle's ops. None if they cannot, and it says that a test is
/// skipped; with `METAL=required` it fails.
///
/// # Panics
/// If they must run and cannot.
pub fn device() -> Option<DeviceChoice> {
    let device = match cfg!(target_os = "macos") {
        true => gpu().then_some(DeviceChoice::Metal),
        false => can().then_some(DeviceChoice::CpuByCandle),
    };
    assert!(device.is_some() || env::var_os("METAL").is_none(), "Metal kernels must run, and cannot");
    device
}

fn gpu() -> bool {
    let opened = Placement::new(DeviceChoice::Metal, DtypeChoice::Float32, DType::F32);
    opened.map_err(|e| eprintln!("SKIPPED: there is no GPU: {e}")).is_ok()
}

fn can() -> bool {
    if !cfg!(unix) {
        eprintln!("SKIPPED: Metal kernels are not played on this system");
        return false;
    }
    let compiler = compiler();
    let can = Command::new(&compiler).arg("--version").output().is_ok_and(|output| output.status.success());
    if !can {
        eprintln!("SKIPPED: there is no compiler for C++ called {compiler}, so Metal kernels cannot be played");
    }
    can
}

fn header() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("metal/stage.h")
}

/// Compiles a program that plays these kernels, or says what the compiler says.
fn compile(kernels: &[Kernel], folder: &Path, name: &str) -> Result<PathBuf, String> {
    let mut text = program("#include \"stage.h\"\n", kernels);
    text.push_str("#undef kernel\n#undef device\n#undef constant\n#undef threadgroup\n#undef thread\n");
    text.push_str("static const stage::Role ROLES[] = {\n");
    for kernel in kernels {
        text.push_str(&format!("    {{\"{0}\", stage::play<{0}>}},\n", kernel.entry()));
    }
    text.push_str("};\nint main() { return stage::serve(ROLES, sizeof ROLES / sizeof *ROLES); }\n");
    let (source, file) = (folder.join(format!("{name}.cpp")), folder.join(name));
    fs::write(&source, text).map_err(|e| format!("{}: {e}", source.display()))?;
    let mut compiler = Command::new(compiler());
    // What C++ leaves undefined ends the program: an address that is no multiple of its type's size, a shift that is too far.
    compiler.args(["-std=c++17", "-O0", "-fsigned-char", "-fno-strict-aliasing", "-fsanitize=undefined"]);
    compiler.arg("-fsanitize-undefined-trap-on-error").args(["-Wall", "-Wextra", "-Werror"]);
    compiler.args(["-Wno-unused-parameter", "-Wno-attributes", "-Wno-unknown-attributes", "-Wno-unused-function"]);
    compiler.args(["-Wno-unused-const-variable", "-Wno-sign-compare", "-Wno-unknown-pragmas"]);
    compiler.arg("-I").arg(header().with_file_name("")).arg("-o").arg(&file).arg(&source);
    let output = compiler.output().map_err(|e| format!("{compiler:?}: {e}"))?;
    match output.status.success() {
        true => Ok(file),
        false => Err(format!("{compiler:?}\n{}", String::from_utf8_lossy(&output.stderr))),
    }
}

/// A program that waits for launches.
struct Program {
    child: Child,
}

impl Program {
    fn start(file: &Path) -> Result<Self, String> {
        let child = Command::new(file).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        child.map(|child| Program { child }).map_err(|e| format!("{}: {e}", file.display()))
    }

    /// The bytes of the outputs.
    fn play(
        &mut self,
        launch: &Launch,
        inputs: &[Vec<u8>],
        outputs: &[usize],
        backwards: bool,
    ) -> Result<Vec<Vec<u8>>, String> {
        let mut call = Vec::new();
        let length = |call: &mut Vec<u8>, n: usize| call.extend((n as u64).to_le_bytes());
        let piece = |call: &mut Vec<u8>, bytes: &[u8]| {
            length(call, bytes.len());
            call.extend(bytes);
        };
        piece(&mut call, launch.kernel.entry().as_bytes());
        length(&mut call, inputs.len() + outputs.len());
        inputs.iter().for_each(|input| piece(&mut call, input));
        // What is not written is NaN.
        outputs.iter().for_each(|&size| piece(&mut call, &vec![0xff; size]));
        piece(&mut call, &launch.numbers.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>());
        let sizes = [launch.shared, launch.groups[0], launch.groups[1], launch.groups[2], launch.threads];
        sizes.into_iter().chain([usize::from(backwards)]).for_each(|n| length(&mut call, n));
        let (Some(to), Some(from)) = (self.child.stdin.as_mut(), self.child.stdout.as_mut()) else {
            return Err("no pipes".into());
        };
        let mut made = vec![0; inputs.iter().map(Vec::len).sum::<usize>() + outputs.iter().sum::<usize>()];
        let talked = to.write_all(&call).and_then(|()| to.flush()).and_then(|()| from.read_exact(&mut made));
        if let Err(e) = talked {
            return Err(self.last_words(launch, &e.to_string()));
        }
        let mut made = made.as_slice();
        let mut all = Vec::new();
        for size in inputs.iter().map(Vec::len).chain(outputs.iter().copied()) {
            let (one, rest) = made.split_at(size);
            all.push(one.to_vec());
            made = rest;
        }
        let written = all.split_off(inputs.len());
        if all != inputs {
            return Err(format!("{} writes to an input", launch.kernel.entry()));
        }
        Ok(written)
    }

    fn last_words(&mut self, launch: &Launch, e: &str) -> String {
        drop(self.child.stdin.take());
        let status = self.child.wait();
        let mut words = String::new();
        if let Some(stderr) = self.child.stderr.as_mut() {
            let _ = stderr.read_to_string(&mut words);
        }
        format!(
            "{launch:?} ended with {status:?} ({e}): {}; SIGSEGV is memory it does not have, SIGILL what C++ leaves undefined",
            words.trim()
        )
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// Kernels that can be played.
#[derive(Default)]
pub struct Stage {
    programs: Vec<Arc<Mutex<Program>>>,
    of_kernel: HashMap<Kernel, usize>,
}

impl Stage {
    /// Compiles those of the kernels that are not there yet.
    pub fn learn<'a>(&mut self, kernels: impl IntoIterator<Item = &'a Kernel>) -> Result<(), String> {
        let mut new: Vec<Kernel> = Vec::new();
        let mut seen = HashSet::new();
        for kernel in kernels {
            if !self.of_kernel.contains_key(kernel) && seen.insert(kernel) {
                new.push(kernel.clone());
            }
        }
        // A program that runs needs its file no more.
        let folder = tempfile::tempdir().map_err(|e| format!("a temporary folder: {e}"))?;
        let folder = folder.path();
        let chunks: Vec<&[Kernel]> = new.chunks(TOGETHER).collect();
        for (round, pair) in chunks.chunks(2).enumerate() {
            let files = std::thread::scope(|scope| {
                let compile = |(i, kernels): (usize, &&'_ [Kernel])| {
                    let (kernels, name) = (kernels.to_vec(), format!("stage{}", 2 * round + i));
                    scope.spawn(move || compile(&kernels, folder, &name))
                };
                let threads: Vec<_> = pair.iter().enumerate().map(compile).collect();
                threads
                    .into_iter()
                    .map(|t| t.join().unwrap_or_else(|_| Err("a thread died".into())))
                    .collect::<Vec<_>>()
            });
            for (kernels, file) in pair.iter().zip(files) {
                self.of_kernel.extend(kernels.iter().map(|k| (k.clone(), self.programs.len())));
                self.programs.push(Arc::new(Mutex::new(Program::start(&file?)?)));
            }
        }
        Ok(())
    }

    fn program(&mut self, kernel: &Kernel) -> Result<Arc<Mutex<Program>>, String> {
        self.learn([kernel])?;
        let program = self.of_kernel.get(kernel).and_then(|&i| self.programs.get(i));
        program.cloned().ok_or_else(|| "the kernel was not compiled".into())
    }
}

/// The one stage of a test's process.
static STAGE: Mutex<Option<Stage>> = Mutex::new(None);

/// Compiles kernels that will be played, all at once.
///
/// # Panics
/// With the compiler's words.
pub fn learn<'a>(kernels: impl IntoIterator<Item = &'a Kernel>) {
    let mut stage = STAGE.lock().unwrap_or_else(PoisonError::into_inner);
    stage.get_or_insert_default().learn(kernels).unwrap_or_else(|e| panic!("{e}"));
}

/// The makers of all kernels that this process has compiled.
pub fn learned() -> HashSet<&'static str> {
    let stage = STAGE.lock().unwrap_or_else(PoisonError::into_inner);
    stage.iter().flat_map(|stage| stage.of_kernel.keys()).map(|kernel| kernel.maker).collect()
}

/// Plays a launch: the bytes of the inputs and the sizes of the outputs -> the bytes of the outputs.
pub fn play(launch: &Launch, inputs: &[Vec<u8>], outputs: &[usize]) -> Result<Vec<Vec<u8>>, String> {
    let program =
        STAGE.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default().program(&launch.kernel)?;
    let mut program = program.lock().unwrap_or_else(PoisonError::into_inner);
    let forwards = program.play(launch, inputs, outputs, false)?;
    match program.play(launch, inputs, outputs, true)? == forwards {
        true => Ok(forwards),
        false => Err(format!("{}: its result depends on which thread comes first", launch.kernel.entry())),
    }
}
