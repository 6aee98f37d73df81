//! Element types of safetensors files.

use std::fmt;

use serde::Deserialize;

/// Every element type that the safetensors format names. Formats read a few of them; the rest are known so
/// that a message can name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[allow(non_camel_case_types, missing_docs)] // the format's own spellings
pub enum Dtype {
    BOOL,
    F4,
    F6_E2M3,
    F6_E3M2,
    U8,
    I8,
    F8_E5M2,
    F8_E4M3,
    F8_E8M0,
    F8_E4M3FNUZ,
    F8_E5M2FNUZ,
    I16,
    U16,
    F16,
    BF16,
    I32,
    U32,
    F32,
    C64,
    F64,
    I64,
    U64,
}

impl Dtype {
    /// Width of one element in bits; below 8 for packed types.
    pub fn bits(self) -> u64 {
        match self {
            Self::F4 => 4,
            Self::F6_E2M3 | Self::F6_E3M2 => 6,
            Self::BOOL | Self::U8 | Self::I8 => 8,
            Self::F8_E5M2 | Self::F8_E4M3 | Self::F8_E8M0 | Self::F8_E4M3FNUZ | Self::F8_E5M2FNUZ => 8,
            Self::I16 | Self::U16 | Self::F16 | Self::BF16 => 16,
            Self::I32 | Self::U32 | Self::F32 => 32,
            Self::C64 | Self::F64 | Self::I64 | Self::U64 => 64,
        }
    }

    /// Bytes of a tensor of this type and `shape`; `None` when the product overflows or the bits do not fill
    /// whole bytes.
    pub fn bytes(self, shape: &[u64]) -> Option<u64> {
        let count = shape.iter().try_fold(1_u64, |count, &dim| count.checked_mul(dim))?;
        let bits = count.checked_mul(self.bits())?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_checks_overflow_and_packing() {
        assert_eq!(Dtype::BF16.bytes(&[3, 5]), Some(30));
        assert_eq!(Dtype::F32.bytes(&[]), Some(4));
        assert_eq!(Dtype::F4.bytes(&[4]), Some(2));
        assert_eq!(Dtype::F4.bytes(&[3]), None);
        assert_eq!(Dtype::U8.bytes(&[u64::MAX, 2]), None);
        assert_eq!(Dtype::F32.bytes(&[1 << 60]), None);
        assert_eq!(
            Dtype::U8.bytes(&[1 << 40, 1 << 40, 0]),
            None,
            "an overflowing prefix is refused even when empty"
        );
    }

    #[test]
    fn widths_agree_with_the_reference_crate() {
        for (ours, theirs) in [
            (Dtype::F4, safetensors::Dtype::F4),
            (Dtype::F6_E2M3, safetensors::Dtype::F6_E2M3),
            (Dtype::U8, safetensors::Dtype::U8),
            (Dtype::F8_E8M0, safetensors::Dtype::F8_E8M0),
            (Dtype::BF16, safetensors::Dtype::BF16),
            (Dtype::F16, safetensors::Dtype::F16),
            (Dtype::F32, safetensors::Dtype::F32),
            (Dtype::C64, safetensors::Dtype::C64),
            (Dtype::U64, safetensors::Dtype::U64),
        ] {
            assert_eq!(ours.bits(), theirs.bitsize() as u64, "{ours}");
            assert_eq!(ours.to_string(), format!("{theirs:?}"));
        }
    }
}
