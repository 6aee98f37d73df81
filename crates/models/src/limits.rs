//! Ceilings far above any known model, low enough that sizes computed from them cannot overflow.

pub(crate) const LAYERS: usize = 1024;
pub(crate) const WIDTH: usize = 1 << 17;
pub(crate) const HEADS: usize = 4096;
pub(crate) const HEAD_DIM: usize = 1024;
pub(crate) const EXPERTS: usize = 4096;
pub(crate) const VOCAB: usize = 1 << 24;
pub(crate) const POSITIONS: usize = 1 << 27;
