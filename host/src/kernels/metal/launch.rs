//! What it takes to run a kernel once, whoever runs it: its text, its numbers, its grid and what comes out. Everything here is plain data,
//! so that kernels and the sizes they are started with can be tried without a GPU.

use candle_core::DType;

/// A file of kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// Packed weights.
    Matmul,
    /// Few queries over a cache.
    Attention,
    /// Norms, rotary positions, gates.
    Rows,
    /// Recurrences.
    Recurrence,
}

impl Source {
    fn text(self) -> &'static [&'static str] {
        match self {
            Source::Matmul => {
                &[include_str!("formats.metal"), include_str!("gguf.metal"), include_str!("matmul.metal")]
            }
            Source::Attention => &[include_str!("attention.metal")],
            Source::Rows => &[include_str!("rows.metal")],
            Source::Recurrence => &[include_str!("recurrence.metal")],
        }
    }
}

/// One kernel of a file, with its types and sizes filled in.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// Where it is.
    pub source: Source,
    /// The macro that makes it.
    pub maker: &'static str,
    /// What it is made for: types and numbers, in the macro's order.
    pub of: Vec<String>,
}

/// What stands before the kernels where Metal compiles them. SHARED is memory that a group shares.
const METAL: &str = "#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;
#define SHARED [[threadgroup(0)]]
";

impl Kernel {
    /// The name of the function.
    pub fn entry(&self) -> String {
        let word = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
        [&["dylm".to_owned(), self.maker.to_lowercase()], self.of.as_slice()]
            .concat()
            .join("_")
            .chars()
            .map(word)
            .collect()
    }

    /// A program in Metal's language that has this kernel alone.
    pub fn program(&self) -> String {
        program(METAL, std::slice::from_ref(self))
    }
}

/// A program of several kernels, behind a text of the compiler's own.
pub fn program(before: &str, kernels: &[Kernel]) -> String {
    let mut text = before.to_owned();
    for source in [Source::Matmul, Source::Attention, Source::Rows, Source::Recurrence] {
        if kernels.iter().any(|kernel| kernel.source == source) {
            source.text().iter().for_each(|part| text.push_str(part));
        }
    }
    for kernel in kernels {
        text.push_str(&format!("{}({}", kernel.maker, kernel.entry()));
        kernel.of.iter().for_each(|of| text.push_str(&format!(", {of}")));
        text.push_str(")\n");
    }
    text
}

/// One run of a kernel. Its arguments are the inputs, the outputs and the numbers, in this order.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    /// What runs.
    pub kernel: Kernel,
    /// Its struct of numbers, in the order of the fields; floats by their bits.
    pub numbers: Vec<u32>,
    /// Groups in x, y and z.
    pub groups: [usize; 3],
    /// Threads of a group.
    pub threads: usize,
    /// Bytes of memory that a group shares.
    pub shared: usize,
    /// Shapes and types of what it writes.
    pub outputs: Vec<(Vec<usize>, DType)>,
}

/// A number as a kernel's struct has it; sizes beyond it are beyond any GPU.
pub fn number(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// A type of activations in Metal's language, of those that kernels are made for.
pub fn word(dtype: DType) -> Option<&'static str> {
    match dtype {
        DType::F32 => Some("float"),
        DType::F16 => Some("half"),
        DType::BF16 => Some("bfloat"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_has_its_files_once_and_then_its_kernels_by_names_of_their_own() {
        let of = |of: &[&str]| Kernel {
            source: Source::Matmul,
            maker: "GATHER",
            of: of.iter().map(|&s| s.to_owned()).collect(),
        };
        let (a, b) = (of(&["AFFINE(4, 64, half)", "float"]), of(&["Q4K", "float"]));
        assert_eq!(a.entry(), "dylm_gather_AFFINE_4__64__half__float");
        let text = program("// first\n", &[a, b]);
        assert!(text.starts_with("// first\n") && text.ends_with("GATHER(dylm_gather_Q4K_float, Q4K, float)\n"));
        assert_eq!(text.matches("struct Affine").count(), 1);
        assert!(!text.contains("struct Attend"));
    }
}
