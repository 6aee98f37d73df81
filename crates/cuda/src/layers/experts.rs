//! The experts of a layer.

use ctxserve_backend::{DeviceError, Moe};

use super::missing;
use crate::backend::{CudaBackend, NormKey};
use crate::driver::Buffer;
use crate::ops::sorted_rows::{Output, SortedRows};
use crate::ops::{moe_combine, moe_down, moe_gate_up, moe_gemm, moe_gemm_bf16, moe_scatter, moe_sort, route};
use crate::weights::Stacks;
use crate::workspace::{EXPERT_ROWS, GEMV_ROWS};

impl CudaBackend {
    /// The experts; of many rows also the norm that comes next, if it is known.
    pub(crate) fn issue_experts(
        &mut self,
        moe: &Moe<Self>,
        next: Option<(&Buffer<f32>, f32)>,
    ) -> Result<(), DeviceError> {
        const OP: &str = "experts";
        let (device, kernels, state, extent) = self.step_parts(OP)?;
        let Moe { norm, router, experts, spec } = moe;
        if experts.spec != *spec || router.rows != spec.experts {
            return Err(DeviceError::new(OP, "router, experts and spec differ"));
        }
        let weights = router.plain.as_ref().ok_or_else(|| missing(OP, "the router"))?;
        let (rows, work) = (extent.rows, &state.work);
        let live = &state.description.arrays().rows;
        let few = match &experts.stacks {
            Stacks::Mxfp4 { gate_up, down, .. } if rows <= EXPERT_ROWS => Some((gate_up, down)),
            _ => None,
        };
        let (norm, eps) = norm.as_norm(spec.norm_eps);
        kernels.route.issue(
            device,
            &route::Call {
                x: &work.x,
                norm,
                router: weights,
                bias: &router.bias,
                live,
                choice: &work.choice,
                weight: &work.weight,
                normed: match few {
                    Some(_) => route::Normed::Rows(&work.h),
                    None => route::Normed::Scales(&work.scale),
                },
                rows,
                hidden: experts.hidden,
                experts: spec.experts,
                top_k: spec.top_k,
                eps,
            },
        )?;
        if let Some((gate_up, down)) = few {
            let shape = moe_gate_up::Shape {
                experts: spec.experts,
                top_k: spec.top_k,
                hidden: experts.hidden,
                inner: experts.inner,
            };
            let gate_up = moe_gate_up::Call {
                weights: gate_up,
                bias: &experts.gate_up_bias,
                h: &work.h,
                choice: &work.choice,
                live,
                a: &work.a,
                rows,
                shape,
                alpha: spec.alpha,
                limit: spec.limit,
            };
            let down = moe_down::Call {
                weights: down,
                bias: &experts.down_bias,
                a: &work.a,
                choice: &work.choice,
                weight: &work.weight,
                live,
                x: &work.x,
                products: &work.products,
                rows,
                shape,
            };
            kernels.gate_up.issue(device, &gate_up)?;
            // Fewer rows are normed where they are read.
            let next = next.filter(|_| rows > GEMV_ROWS);
            let Some((weight, eps)) = next else { return kernels.down.issue(device, &down) };
            if kernels.down.issue_products(device, &down)? {
                kernels.combine.issue(
                    device,
                    &moe_combine::Call {
                        x: &work.x,
                        y: moe_combine::Outputs::F32(&work.products),
                        position: None,
                        weight: &work.weight,
                        live,
                        rows,
                        sorted: rows * spec.top_k,
                        cols: experts.hidden,
                        stride: experts.hidden,
                        slots: spec.top_k,
                        norm: Some(moe_combine::Norm {
                            weight,
                            eps,
                            y: &work.normed,
                            capacity: extent.capacity(),
                        }),
                    },
                )?;
                self.normed = Some(NormKey::new(weight, eps));
            }
            return Ok(());
        }
        self.issue_many_experts(moe, next)
    }

    /// The experts of more rows: sorted by expert, gathered, multiplied, combined.
    fn issue_many_experts(
        &mut self,
        moe: &Moe<Self>,
        next: Option<(&Buffer<f32>, f32)>,
    ) -> Result<(), DeviceError> {
        const OP: &str = "experts";
        let (device, kernels, state, extent) = self.step_parts(OP)?;
        let Moe { experts, spec, .. } = moe;
        let (weight, _) = moe.norm.as_norm(spec.norm_eps);
        let (rows, work) = (extent.rows, &state.work);
        let live = &state.description.arrays().rows;
        let bf16 = matches!(experts.stacks, Stacks::Bf16 { .. });
        let height = match bf16 {
            true => moe_gemm_bf16::height(rows, spec.top_k, spec.experts),
            false => moe_gemm::height(rows, spec.top_k, spec.experts),
        };
        // Fewer rows are normed where they are read.
        let next = next.filter(|_| rows > GEMV_ROWS);
        let shape = moe_sort::Shape { rows, slots: spec.top_k, experts: spec.experts, height };
        let sorted = shape.sorted();
        if sorted > work.sorted {
            return Err(DeviceError::new(
                OP,
                format!("{sorted} sorted rows, there is room for {}", work.sorted),
            ));
        }
        let sorts = moe_scatter::can_sort(&shape);
        if !sorts {
            kernels.sort.issue(
                device,
                &moe_sort::Call {
                    choice: &work.choice,
                    live,
                    position: &work.position,
                    source: &work.source,
                    tiles: &work.tiles,
                    counts: &work.counts,
                    shape,
                },
            )?;
        }
        kernels.scatter.issue(
            device,
            &moe_scatter::Call {
                x: &work.x,
                weight,
                scale: &work.scale,
                y: &work.sorted_h,
                bf16,
                position: &work.position,
                live,
                rows,
                slots: spec.top_k,
                cols: experts.hidden,
                capacity: sorted,
                sort: sorts.then_some(moe_scatter::Sort {
                    choice: &work.choice,
                    tiles: &work.tiles,
                    counts: &work.counts,
                    shape,
                }),
            },
        )?;
        let (hidden, inner) = (experts.hidden, experts.inner);
        let sorted_rows = |bias, x, y, rows, cols| SortedRows {
            bias,
            x,
            y,
            tiles: &work.tiles,
            counts: &work.counts,
            experts: spec.experts,
            rows,
            cols,
            capacity: sorted,
            height,
            most_tiles: shape.tiles(),
        };
        let gated = Output::SwiGlu { y: &work.sorted_a, alpha: spec.alpha, limit: spec.limit };
        let into_inner = sorted_rows(&experts.gate_up_bias, &work.sorted_h, gated, 2 * inner, hidden);
        let summed = Output::Bf16(&work.sorted_y);
        let out_of_inner = sorted_rows(&experts.down_bias, &work.sorted_a, summed, hidden, inner);
        match &experts.stacks {
            Stacks::Mxfp4 { gate_up, gate_up_exponents, down, down_exponents } => {
                let issue = |w, exponents, rows| {
                    kernels.experts.issue(device, &moe_gemm::Call { w, exponents, rows })
                };
                issue(gate_up, gate_up_exponents, into_inner)?;
                issue(down, down_exponents, out_of_inner)?;
            }
            Stacks::Bf16 { gate_up, down } => {
                let issue = |w, rows| kernels.experts_bf16.issue(device, &moe_gemm_bf16::Call { w, rows });
                issue(gate_up, into_inner)?;
                issue(down, out_of_inner)?;
            }
        }
        kernels.combine.issue(
            device,
            &moe_combine::Call {
                x: &work.x,
                y: moe_combine::Outputs::Bf16(&work.sorted_y),
                position: Some(&work.position),
                weight: &work.weight,
                live,
                rows,
                sorted,
                cols: hidden,
                stride: hidden,
                slots: spec.top_k,
                norm: next.map(|(weight, eps)| moe_combine::Norm {
                    weight,
                    eps,
                    y: &work.normed,
                    capacity: extent.capacity(),
                }),
            },
        )?;
        self.normed = next.map(|(weight, eps)| NormKey::new(weight, eps));
        Ok(())
    }
}
