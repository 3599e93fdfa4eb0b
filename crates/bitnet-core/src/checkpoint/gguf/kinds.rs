//! The tensor types of ggml: number, name and how many bytes a tensor of some shape has.

use crate::quant::formats::i2_s;

/// A tensor type: a row of the table of ggml types that this crate can at least name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorKind {
    /// Number in the file.
    pub id: u32,
    /// The name people know it by.
    pub name: &'static str,
    pub(super) size: Size,
}

/// How many bytes a tensor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Size {
    /// Blocks of so many values in so many bytes, along the contiguous dimension.
    Blocks { values: u64, bytes: u64 },
    /// Two bits a value and a tail of 32 bytes.
    I2S,
    /// Not known from the shape: as far as the next tensor.
    ToNext,
}

impl TensorKind {
    /// Bytes of a tensor of this type and shape; `None` when it is not known or the shape is impossible.
    pub(super) fn bytes(&self, dimensions: &[u64]) -> Option<u64> {
        let values = dimensions.iter().try_fold(1u64, |product, &dimension| product.checked_mul(dimension))?;
        match self.size {
            Size::Blocks { values: per_block, bytes } => {
                let whole = dimensions.first()?.is_multiple_of(per_block);
                whole.then(|| values.checked_div(per_block))??.checked_mul(bytes)
            }
            Size::I2S => values.is_multiple_of(4).then_some(values / 4)?.checked_add(i2_s::TAIL_BYTES as u64),
            Size::ToNext => None,
        }
    }
}

const fn blocks(id: u32, name: &'static str, values: u64, bytes: u64) -> TensorKind {
    TensorKind { id, name, size: Size::Blocks { values, bytes } }
}

/// Every type worth naming. Those that cannot be used are here so that the message can say what the file is.
pub(super) const KINDS: &[TensorKind] = &[
    blocks(0, "F32", 1, 4),
    blocks(1, "F16", 1, 2),
    blocks(2, "Q4_0", 32, 18),
    blocks(3, "Q4_1", 32, 20),
    blocks(6, "Q5_0", 32, 22),
    blocks(7, "Q5_1", 32, 24),
    blocks(8, "Q8_0", 32, 34),
    blocks(9, "Q8_1", 32, 40),
    blocks(10, "Q2_K", 256, 84),
    blocks(11, "Q3_K", 256, 110),
    blocks(12, "Q4_K", 256, 144),
    blocks(13, "Q5_K", 256, 176),
    blocks(14, "Q6_K", 256, 210),
    blocks(15, "Q8_K", 256, 292),
    blocks(16, "IQ2_XXS", 256, 66),
    blocks(17, "IQ2_XS", 256, 74),
    blocks(18, "IQ3_XXS", 256, 98),
    blocks(19, "IQ1_S", 256, 50),
    blocks(20, "IQ4_NL", 32, 18),
    blocks(21, "IQ3_S", 256, 110),
    blocks(22, "IQ2_S", 256, 82),
    blocks(23, "IQ4_XS", 256, 136),
    blocks(24, "I8", 1, 1),
    blocks(25, "I16", 1, 2),
    blocks(26, "I32", 1, 4),
    blocks(27, "I64", 1, 8),
    blocks(28, "F64", 1, 8),
    blocks(29, "IQ1_M", 256, 56),
    blocks(30, "BF16", 1, 2),
    blocks(34, "TQ1_0", 256, 54),
    blocks(35, "TQ2_0", 256, 66),
    TensorKind { id: 36, name: "I2_S", size: Size::I2S },
    TensorKind { id: 38, name: "TL1", size: Size::ToNext },
    blocks(39, "MXFP4", 32, 17),
    TensorKind { id: 39, name: "TL2", size: Size::ToNext },
    TensorKind { id: 133, name: "Q6_0", size: Size::ToNext },
    TensorKind { id: 134, name: "IQ1_BN", size: Size::ToNext },
    TensorKind { id: 135, name: "IQ2_BN", size: Size::ToNext },
    TensorKind { id: 335, name: "IQ2_BN_R4", size: Size::ToNext },
];
