//! An NVIDIA GPU by its number, or a sentence that says what there is too little of: a card, a driver, a library.
//!
//! Nothing of NVIDIA's is linked. The driver brings libcuda; cuBLAS and cuRAND come with the CUDA toolkit or with PyTorch's wheels, where no
//! system looks for libraries: they are opened here by their full path, and whoever asks for them by name later gets those.

use candle_core::{
    CudaDevice, Device,
    cuda_backend::cudarc::{
        cublas, curand,
        driver::{self, CudaContext},
    },
};
use std::{
    collections::BTreeMap,
    env,
    path::{Path, PathBuf},
    sync::{Mutex, Once, PoisonError},
};

/// In this order, for each needs those before it.
const LIBRARIES: [&str; 5] =
    ["libcudart.so.13", "libnvJitLink.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10"];

/// Opens the GPU, with what recording a step asks for: a stream of its own, and memory that stays with the program between steps.
pub fn open(number: usize) -> Result<Device, String> {
    // One for all models: kernels are compiled and memory is kept by device.
    static OPEN: Mutex<BTreeMap<usize, Device>> = Mutex::new(BTreeMap::new());
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(device) = open.get(&number) {
        return Ok(device.clone());
    }
    let device = opened(number)?;
    open.insert(number, device.clone());
    Ok(device)
}

fn opened(number: usize) -> Result<Device, String> {
    // SAFETY: only looks for a library, and keeps it.
    if !unsafe { driver::sys::is_culib_present() } {
        return Err("there is no NVIDIA driver on this machine (libcuda.so.1)".into());
    }
    static FIRST: Once = Once::new();
    FIRST.call_once(open_libraries);
    // SAFETY: as above.
    let found = unsafe { [cublas::sys::is_culib_present(), curand::sys::is_culib_present()] };
    for (there, name) in found.into_iter().zip(["cuBLAS (libcublas.so.13)", "cuRAND (libcurand.so.10)"]) {
        if !there {
            return Err(format!(
                "NVIDIA's library {name} is not found; install the CUDA 13 toolkit, or the wheels nvidia-cublas and nvidia-curand, and \
                 name their folders in LD_LIBRARY_PATH"
            ));
        }
    }
    let said = |e: &dyn std::fmt::Display| e.to_string().lines().next().unwrap_or_default().to_owned();
    let count = CudaContext::device_count().map_err(|e| said(&e))? as usize;
    if number >= count {
        return Err(match count {
            1 => format!("there is no GPU {number} on this machine, only 0"),
            _ => format!("there is no GPU {number} on this machine, only 0 to {}", count.saturating_sub(1)),
        });
    }
    let device = CudaDevice::new_with_stream(number).map_err(|e| said(&e))?;
    // SAFETY: all work of the program is in the device's one stream, in the order in which it was asked for.
    unsafe { device.disable_event_tracking() };
    keep_memory(&device).map_err(|e| said(&e))?;
    Ok(Device::Cuda(device))
}

/// What a step gives back stays the program's: the driver would take it at each read-back, and map it again for the next step.
fn keep_memory(device: &CudaDevice) -> Result<(), driver::DriverError> {
    let mut all = u64::MAX;
    let context = device.cuda_stream().context().clone();
    let what = driver::sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the attribute is a u64.
    unsafe {
        let pool = driver::result::device::get_mem_pool(context.cu_device())?;
        driver::result::mem_pool::set_attribute(pool, what, (&raw mut all).cast())
    }
}

fn open_libraries() {
    let folders = folders();
    LIBRARIES.iter().filter_map(|name| library_in(name, &folders)).for_each(std::mem::forget);
}

/// One of NVIDIA's libraries, wherever it may lie.
pub fn library(name: &str) -> Option<libloading::Library> {
    library_in(name, &folders())
}

fn library_in(name: &str, folders: &[PathBuf]) -> Option<libloading::Library> {
    // What the system finds by itself is taken first: LD_LIBRARY_PATH says so.
    let paths = std::iter::once(PathBuf::from(name)).chain(folders.iter().map(|folder| folder.join(name)));
    let mut there = paths.filter(|path| path.parent().is_none_or(|p| p.as_os_str().is_empty()) || path.is_file());
    // SAFETY: NVIDIA's libraries may be opened at any time.
    there.find_map(|path| unsafe { libloading::Library::new(path) }.ok())
}

/// Where CUDA's libraries may lie: a toolkit, or the packages of the Python that is in use.
fn folders() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = ["CUDA_HOME", "CUDA_PATH"]
        .into_iter()
        .filter_map(env::var_os)
        .map(PathBuf::from)
        .chain([PathBuf::from("/usr/local/cuda")])
        .flat_map(|home| [home.join("lib64"), home.join("lib")])
        .collect();
    let path = env::var_os("PATH").unwrap_or_default();
    let pythons = env::split_paths(&path).filter(|folder| folder.join("python3").exists());
    let beside = pythons.filter_map(|bin| bin.parent().map(|prefix| prefix.join("lib")));
    let homes = env::var_os("VIRTUAL_ENV").map(|home| PathBuf::from(home).join("lib"));
    for lib in homes.into_iter().chain(beside) {
        for version in entries(&lib) {
            for packages in ["site-packages", "dist-packages"] {
                folders.extend(entries(&version.join(packages).join("nvidia")).map(|package| package.join("lib")));
            }
        }
    }
    folders.retain(|folder| folder.is_dir());
    folders
}

fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path())
}
