//! A backend without arithmetic: it writes down what it is given and asked for.

use std::sync::Arc;

use ctxserve_backend::{
    AttentionInput, AttentionSpec, Backend, Batch, DeviceError, ExpertSpec, ExpertWeights, KvPlan, Mlp, Moe,
    Role, RopeTable, SampleError, SampleRow, Sampled, SequenceSlice,
};
use ctxserve_core::{Encoding, Matrix};

type Done<T = ()> = Result<T, DeviceError>;

/// A batch of `rows` tokens, inside a prompt or at its end.
pub(crate) fn prompt(rows: usize, ends: bool) -> Batch {
    let sample = ends.then(|| SampleRow::new(Arc::default()));
    let slice = SequenceSlice { key: 0, rows: 0..rows, start: 0, feed: None, tables: Arc::default(), sample };
    Batch { tokens: vec![0; rows], sequences: vec![slice] }
}

/// What arrived, and which ops ran, in order.
#[derive(Debug)]
pub(crate) struct Ledger {
    pub(crate) accepts: Vec<Encoding>,
    pub(crate) loads: Vec<String>,
    pub(crate) ops: Vec<String>,
    /// The load that fails, counted from zero.
    pub(crate) fails_at: Option<usize>,
}

impl Ledger {
    pub(crate) fn new(accepts: &[Encoding]) -> Self {
        Self { accepts: accepts.to_vec(), loads: Vec::new(), ops: Vec::new(), fails_at: None }
    }

    fn load(&mut self, entry: String) -> Done {
        if self.fails_at == Some(self.loads.len()) {
            return Err(DeviceError::new("load", "out of memory"));
        }
        self.loads.push(entry);
        Ok(())
    }

    fn op(&mut self, entry: impl Into<String>) -> Done {
        self.ops.push(entry.into());
        Ok(())
    }
}

fn shape(matrix: &Matrix) -> String {
    format!("{:?} [{}, {}]", matrix.encoding(), matrix.rows(), matrix.cols())
}

impl Backend for Ledger {
    /// What it was when loaded.
    type Matrix = String;
    type Experts = ();
    type Vector = usize;
    type Kv = ();
    type Hidden = ();
    type Heads = ();
    type Logits = ();
    type Pending = ();

    fn describe(&self) -> String {
        "ledger".to_owned()
    }

    fn accepts(&self, encoding: Encoding) -> bool {
        self.accepts.contains(&encoding)
    }

    fn load_matrix(&mut self, matrix: Matrix, bias: Option<Vec<f32>>, _role: Role<'_>) -> Done<String> {
        assert!(self.accepts(matrix.encoding()), "{}", shape(&matrix));
        let entry = format!("{} bias {:?}", shape(&matrix), bias.map(|bias| bias.len()));
        self.load(entry.clone())?;
        Ok(entry)
    }

    fn load_vector(&mut self, values: Vec<f32>) -> Done<usize> {
        self.load(format!("[{}]", values.len()))?;
        Ok(values.len())
    }

    fn load_experts(&mut self, weights: ExpertWeights, spec: &ExpertSpec) -> Done {
        assert!(self.accepts(weights.gate_up.encoding()) && self.accepts(weights.down.encoding()));
        let biases = (weights.gate_up_bias.len(), weights.down_bias.len());
        let (gate_up, down) = (shape(&weights.gate_up), shape(&weights.down));
        self.load(format!("{gate_up} {down} biases {biases:?} top {}", spec.top_k))
    }

    fn allocate_kv(&mut self, _: &KvPlan) -> Done {
        Ok(())
    }

    fn begin(&mut self, _: &Batch, (): &(), vocab: usize) -> Done {
        self.op(format!("begin {vocab}"))
    }

    fn embed(&mut self, table: &String, _: &Batch) -> Done {
        self.op(format!("embed {table}"))
    }

    fn attention_input(
        &mut self,
        layer: usize,
        weights: &AttentionInput<Self>,
        spec: &AttentionSpec,
        rope: &RopeTable,
        (): &(),
        (): &mut (),
        _: &Batch,
    ) -> Done {
        let norms = if weights.head_norms.is_some() { ", norms of heads" } else { "" };
        self.op(format!("input {layer} {:?} {}{norms}", spec.window, rope.inv_freq.len()))
    }

    fn narrow(&mut self, layer: usize, (): &mut (), (): &mut (), _: &Batch) -> Done {
        self.op(format!("narrow {layer}"))
    }

    fn attention(
        &mut self,
        layer: usize,
        _: &AttentionSpec,
        sinks: Option<&usize>,
        (): &(),
        (): &(),
        _: &Batch,
    ) -> Done {
        self.op(format!("attention {layer} sinks {sinks:?}"))
    }

    fn attention_output(&mut self, output: &String, (): &(), (): &mut ()) -> Done {
        self.op(format!("output {output}"))
    }

    fn experts(&mut self, _: &Moe<Self>, (): &mut ()) -> Done {
        self.op("experts")
    }

    fn mlp(&mut self, _: &Mlp<Self>, (): &mut ()) -> Done {
        self.op("mlp")
    }

    fn logits(&mut self, norm: &usize, _: f32, head: &String, (): &(), _: &Batch) -> Done {
        self.op(format!("logits [{norm}] {head}"))
    }

    fn sample(&mut self, (): &(), _: &Batch) -> Done {
        Ok(())
    }

    fn collect(&mut self, (): ()) -> Done<Vec<Result<Sampled, SampleError>>> {
        Ok(Vec::new())
    }

    fn read_logits(&mut self, (): &()) -> Done<Vec<f32>> {
        Ok(Vec::new())
    }
}
