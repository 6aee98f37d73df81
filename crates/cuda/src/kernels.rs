//! The loaded kernels of a device. Those whose launch depends on the number of rows are loaded when it first comes.

use ctxserve_backend::DeviceError;

use crate::driver::Device;
use crate::ops::attention::HEAD_DIM;
use crate::ops::attention_decode::AttentionDecode;
use crate::ops::attention_prefill::AttentionPrefill;
use crate::ops::embed::Embed;
use crate::ops::gemm::Gemm;
use crate::ops::gemm_nvfp4::GemmNvfp4;
use crate::ops::gemv_gate_up::{self, GemvGateUp};
use crate::ops::gemv_head::{self, GemvHead};
use crate::ops::gemv_nvfp4::{self, GemvNvfp4};
use crate::ops::gemv_out::{self, GemvOut};
use crate::ops::gemv_qkv::{self, GemvQkv};
use crate::ops::kv_append::KvAppend;
use crate::ops::kv_gather::KvGather;
use crate::ops::moe_combine::MoeCombine;
use crate::ops::moe_down::MoeDown;
use crate::ops::moe_gate_up::MoeGateUp;
use crate::ops::moe_gemm::MoeGemm;
use crate::ops::moe_gemm_bf16::MoeGemmBf16;
use crate::ops::moe_scatter::MoeScatter;
use crate::ops::moe_sort::MoeSort;
use crate::ops::narrow::Narrow;
use crate::ops::pack_panels::PackPanels;
use crate::ops::quantise_nvfp4::QuantiseNvfp4;
use crate::ops::rms_norm::RmsNorm;
use crate::ops::rope_table::RopeTable;
use crate::ops::route::Route;

/// All of them.
#[derive(Debug)]
pub(crate) struct Kernels {
    pub(crate) embed: Embed,
    pub(crate) pack: PackPanels,
    pub(crate) norm: RmsNorm,
    pub(crate) turns: RopeTable,
    pub(crate) narrow: Narrow,
    pub(crate) scatter: MoeScatter,
    pub(crate) gemm: Gemm,
    pub(crate) heads: HeadKernels,
    pub(crate) route: Route,
    pub(crate) gate_up: MoeGateUp,
    pub(crate) down: MoeDown,
    pub(crate) sort: MoeSort,
    pub(crate) experts: MoeGemm,
    pub(crate) experts_bf16: MoeGemmBf16,
    pub(crate) combine: MoeCombine,
    qkv: Vec<(gemv_qkv::Dims, GemvQkv)>,
    out: Vec<(gemv_out::Dims, GemvOut)>,
    head: Vec<(gemv_head::Dims, GemvHead)>,
    gate_up_dense: Vec<(gemv_gate_up::Dims, GemvGateUp)>,
    nvfp4: Vec<(gemv_nvfp4::Dims, GemvNvfp4)>,
    gemm_nvfp4: Option<GemmNvfp4>,
    quantise: Option<QuantiseNvfp4>,
}

/// Those that are made for one length of heads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeadKernels {
    pub(crate) append: KvAppend,
    pub(crate) gather: KvGather,
    pub(crate) decode: AttentionDecode,
    pub(crate) prefill: AttentionPrefill,
    /// Elements of a head.
    pub(crate) dim: usize,
}

impl HeadKernels {
    fn load(device: &Device, dim: usize) -> Result<Self, DeviceError> {
        Ok(Self {
            append: KvAppend::load_for(device, dim)?,
            gather: KvGather::load_for(device, dim)?,
            decode: AttentionDecode::load_for(device, dim)?,
            prefill: AttentionPrefill::load_for(device, dim)?,
            dim,
        })
    }
}

/// The entry for `key`, loaded when it is first asked for.
fn entry<K: PartialEq + Copy, V: Copy>(
    list: &mut Vec<(K, V)>,
    key: K,
    load: impl FnOnce() -> Result<V, DeviceError>,
) -> Result<V, DeviceError> {
    if let Some((_, found)) = list.iter().find(|(known, _)| *known == key) {
        return Ok(*found);
    }
    let loaded = load()?;
    list.push((key, loaded));
    Ok(loaded)
}

impl Kernels {
    pub(crate) fn load(device: &Device) -> Result<Self, DeviceError> {
        Ok(Self {
            embed: Embed::load(device)?,
            pack: PackPanels::load(device)?,
            norm: RmsNorm::load(device)?,
            turns: RopeTable::load(device)?,
            narrow: Narrow::load(device)?,
            scatter: MoeScatter::load(device)?,
            gemm: Gemm::load(device)?,
            heads: HeadKernels::load(device, HEAD_DIM)?,
            route: Route::load(device)?,
            gate_up: MoeGateUp::load(device)?,
            down: MoeDown::load(device)?,
            sort: MoeSort::load(device)?,
            experts: MoeGemm::load(device)?,
            experts_bf16: MoeGemmBf16::load(device)?,
            combine: MoeCombine::load(device)?,
            qkv: Vec::new(),
            out: Vec::new(),
            head: Vec::new(),
            gate_up_dense: Vec::new(),
            nvfp4: Vec::new(),
            gemm_nvfp4: None,
            quantise: None,
        })
    }

    /// Has those for heads of `dim` elements, as padded, in place of others.
    pub(crate) fn turn_to_heads(&mut self, device: &Device, dim: usize) -> Result<(), DeviceError> {
        if self.heads.dim != dim {
            self.heads = HeadKernels::load(device, dim)?;
        }
        Ok(())
    }

    pub(crate) fn qkv(&mut self, device: &Device, dims: gemv_qkv::Dims) -> Result<GemvQkv, DeviceError> {
        entry(&mut self.qkv, dims, || GemvQkv::load(device, dims))
    }

    pub(crate) fn out(&mut self, device: &Device, dims: gemv_out::Dims) -> Result<GemvOut, DeviceError> {
        entry(&mut self.out, dims, || GemvOut::load(device, dims))
    }

    pub(crate) fn head(&mut self, device: &Device, dims: gemv_head::Dims) -> Result<GemvHead, DeviceError> {
        entry(&mut self.head, dims, || GemvHead::load(device, dims))
    }

    pub(crate) fn gate_up_dense(
        &mut self,
        device: &Device,
        dims: gemv_gate_up::Dims,
    ) -> Result<GemvGateUp, DeviceError> {
        entry(&mut self.gate_up_dense, dims, || GemvGateUp::load(device, dims))
    }

    pub(crate) fn nvfp4(
        &mut self,
        device: &Device,
        dims: gemv_nvfp4::Dims,
    ) -> Result<GemvNvfp4, DeviceError> {
        entry(&mut self.nvfp4, dims, || GemvNvfp4::load(device, dims))
    }

    /// Only models that are stored so need them.
    pub(crate) fn gemm_nvfp4(&mut self, device: &Device) -> Result<GemmNvfp4, DeviceError> {
        let loaded = match self.gemm_nvfp4 {
            Some(loaded) => loaded,
            None => GemmNvfp4::load(device)?,
        };
        self.gemm_nvfp4 = Some(loaded);
        Ok(loaded)
    }

    /// Only products whose inputs are rounded need them.
    pub(crate) fn quantise(&mut self, device: &Device) -> Result<QuantiseNvfp4, DeviceError> {
        let loaded = match self.quantise {
            Some(loaded) => loaded,
            None => QuantiseNvfp4::load(device)?,
        };
        self.quantise = Some(loaded);
        Ok(loaded)
    }
}
