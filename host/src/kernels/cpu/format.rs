//! How the weights of a matrix may be packed, and what each packing weighs.
//! MLX's own formats keep scales beside the words (mlx.core.quantize); GGUF's keep them inside blocks (ggml-common.h).

/// A plain floating-point type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Float {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// The upper half of a single.
    BF16,
}

impl Float {
    /// Bytes of one value.
    pub const fn size(self) -> usize {
        match self {
            Float::F32 => 4,
            Float::F16 | Float::BF16 => 2,
        }
    }

    /// The value in the first bytes of `bytes`, little-endian; 0 if there are too few.
    #[inline]
    pub fn read(self, bytes: &[u8]) -> f32 {
        match (self, bytes) {
            (Float::F32, &[a, b, c, d, ..]) => f32::from_le_bytes([a, b, c, d]),
            (Float::F16, &[a, b, ..]) => half::f16::from_le_bytes([a, b]).to_f32(),
            (Float::BF16, &[a, b, ..]) => f32::from_bits(u32::from(u16::from_le_bytes([a, b])) << 16),
            _ => 0.0,
        }
    }

    /// Appends a value, rounded to nearest even.
    pub fn write(self, x: f32, to: &mut Vec<u8>) {
        match self {
            Float::F32 => to.extend(x.to_le_bytes()),
            Float::F16 => to.extend(half::f16::from_f32(x).to_le_bytes()),
            Float::BF16 => to.extend(half::bf16::from_f32(x).to_le_bytes()),
        }
    }

    /// The value as it survives being stored.
    pub fn round(self, x: f32) -> f32 {
        match self {
            Float::F32 => x,
            Float::F16 => half::f16::from_f32(x).to_f32(),
            Float::BF16 => half::bf16::from_f32(x).to_f32(),
        }
    }
}

/// How a matrix is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// One float a weight.
    Dense(Float),
    /// MLX affine: w = q * scale + bias, q a little-endian bit stream in each row.
    Affine {
        /// 2, 3, 4, 5, 6 or 8.
        bits: u32,
        /// 32, 64 or 128 weights share a scale and a bias.
        group: usize,
        /// Type of scales and biases.
        scales: Float,
    },
    /// OCP MX: E2M1 nibbles, an E8M0 scale for 32.
    Mxfp4,
    /// OCP MX: E4M3 bytes, an E8M0 scale for 32.
    Mxfp8,
    /// E2M1 nibbles, an E4M3 scale for 16.
    Nvfp4,
    /// The same with an f32 factor a row, as NVIDIA's and vLLM's tools write it: theirs is one of the whole matrix, but rows of several
    /// matrices may be stacked.
    Nvfp4Scaled,
    /// E4M3 bytes, an f32 scale for each `block` columns of a row; the last block of a row may be shorter. Checkpoints have a scale for
    /// blocks of rows too, repeated here: 0.25 bits a weight for blocks of 128, and rows can be cut anywhere.
    Fp8 {
        /// Columns that share a scale.
        block: usize,
    },
    /// GGUF: blocks of 32, 4 bits, scale.
    Q4_0,
    /// GGUF: blocks of 32, 4 bits, scale and minimum.
    Q4_1,
    /// GGUF: blocks of 32, 5 bits, scale.
    Q5_0,
    /// GGUF: blocks of 32, 5 bits, scale and minimum.
    Q5_1,
    /// GGUF: blocks of 32, 8 bits, scale.
    Q8_0,
    /// GGUF: blocks of 256, 2 bits.
    Q2K,
    /// GGUF: blocks of 256, 3 bits.
    Q3K,
    /// GGUF: blocks of 256, 4 bits.
    Q4K,
    /// GGUF: blocks of 256, 5 bits.
    Q5K,
    /// GGUF: blocks of 256, 6 bits.
    Q6K,
}

impl Format {
    /// Weights that cannot be separated, and the bytes they take in `data`. The columns are a multiple of the former.
    pub const fn block(self) -> (usize, usize) {
        match self {
            Format::Dense(float) => (1, float.size()),
            Format::Affine { bits, group, .. } => (group, group * bits as usize / 8),
            Format::Mxfp4 => (32, 16),
            Format::Mxfp8 => (32, 32),
            Format::Nvfp4 | Format::Nvfp4Scaled => (16, 8),
            Format::Fp8 { .. } => (1, 1),
            Format::Q4_0 => (32, 18),
            Format::Q4_1 => (32, 20),
            Format::Q5_0 => (32, 22),
            Format::Q5_1 => (32, 24),
            Format::Q8_0 => (32, 34),
            Format::Q2K => (256, 84),
            Format::Q3K => (256, 110),
            Format::Q4K => (256, 144),
            Format::Q5K => (256, 176),
            Format::Q6K => (256, 210),
        }
    }

    /// Bytes that one block takes in `scales`, and in `biases`; see [`Format::row_bytes`] for what is not counted by blocks.
    const fn beside(self) -> (usize, usize) {
        match self {
            Format::Affine { scales, .. } => (scales.size(), scales.size()),
            Format::Mxfp4 | Format::Mxfp8 | Format::Nvfp4 | Format::Nvfp4Scaled => (1, 0),
            _ => (0, 0),
        }
    }

    /// Bytes of a row of `cols` weights in data, scales and biases.
    pub const fn row_bytes(self, cols: usize) -> [usize; 3] {
        let ((block, bytes), (scale, bias)) = (self.block(), self.beside());
        let blocks = cols / block;
        match self {
            Format::Fp8 { block } => [cols, cols.div_ceil(if block == 0 { 1 } else { block }) * 4, 0],
            Format::Nvfp4Scaled => [blocks * bytes, blocks, 4],
            _ => [blocks * bytes, blocks * scale, blocks * bias],
        }
    }

    /// Bits of memory a weight takes, scales included, in rows that are long.
    pub fn bits_per_weight(self) -> f64 {
        let ((weights, bytes), (scale, bias)) = (self.block(), self.beside());
        match self {
            Format::Fp8 { block } => 8.0 + 32.0 / block as f64,
            _ => (bytes + scale + bias) as f64 * 8.0 / weights as f64,
        }
    }

    /// Whether the numbers of the variant itself make sense.
    pub fn is_known(self) -> bool {
        match self {
            Format::Affine { bits, group, .. } => {
                matches!(bits, 2 | 3 | 4 | 5 | 6 | 8) && matches!(group, 32 | 64 | 128)
            }
            Format::Fp8 { block } => block > 0,
            _ => true,
        }
    }
}
