//! A prompt's logits are wanted of its last token alone, and behind the last op that looks from one token at another so is all else: from
//! there a step goes on with the rows that are wanted, which spares it most of its last layer. A run on shapes tells which op that is.

use super::{
    noting::{Noted, Word},
    running::Running,
    value::Value,
};
use candle_core::Tensor;
use plugin_api::abi::Handle;
use std::collections::HashSet;

/// Which rows a step goes on with, and behind which op.
#[derive(Clone, Debug)]
pub struct LastRows {
    /// Ops to come that look from token to token.
    pub left: usize,
    /// Of the step's tokens.
    pub rows: Vec<u32>,
}

/// Ops whose every row is made of the same row of each input. All others are taken to look from token to token.
const BY_ROW: &[&str] = &[
    "abs",
    "add",
    "affine",
    "clamp",
    "concat",
    "div",
    "exp",
    "experts",
    "floor",
    "flatten",
    "gather",
    "geglu",
    "gelu",
    "gelu_tanh",
    "greater",
    "linear",
    "log",
    "matmul",
    "max",
    "maximum",
    "mean",
    "merge_heads",
    "minimum",
    "mul",
    "multi_linear",
    "narrow",
    "neg",
    "norm",
    "parameter",
    "relu",
    "round",
    "rsqrt",
    "sigmoid",
    "silu",
    "sinkhorn",
    "softmax",
    "softplus",
    "split_heads",
    "sqrt",
    "square",
    "sub",
    "sum",
    "swiglu",
    "tanh",
    "top_mask",
    "topk",
    "transpose",
    "unembed",
    "unflatten",
];
/// Those of them that take an axis before the last one for a matrix' rows.
const OF_MATRICES: &[&str] = &["flatten", "matmul", "sinkhorn", "transpose"];

fn looks_across(op: &str) -> bool {
    !BY_ROW.contains(&op)
}

/// How many ops of `forward` in a step of so many tokens look from one to another; none if rows cannot be told from what else there is
/// behind the last one of them.
pub fn looks(notes: &[Noted], tokens: usize) -> Option<usize> {
    let end = notes.iter().position(|noted| noted.op == "rows")?;
    // The step's tokens themselves are given.
    let forward = notes.get(1..end)?;
    let last = forward.iter().rposition(|noted| looks_across(&noted.op))?;
    let mut of_rows: HashSet<u64> = notes.iter().take(1).map(|noted| noted.gives.0).collect();
    let is_of_rows = |dims: &[usize]| dims.len() > 1 && dims[0] == tokens;
    for (i, Noted { op, said, gives, dims, .. }) in forward.iter().enumerate() {
        let inputs = said.iter().filter_map(|word| if let Word::Tensor(x) = word { Some(*x) } else { None });
        let inputs: Vec<Handle> = inputs.filter(|&x| x != Handle::NONE).collect();
        let is_made_of_rows = op != "parameter" && (looks_across(op) || inputs.iter().any(|x| of_rows.contains(&x.0)));
        // Tensors that are as long as the step by chance would lose rows too.
        if !is_made_of_rows && dims.first() == Some(&tokens) {
            return None;
        }
        if is_made_of_rows {
            of_rows.insert(gives.0);
        }
        if i <= last || !is_made_of_rows {
            continue;
        }
        let shape = |x: &Handle| forward.iter().find(|noted| noted.gives == *x).map_or(&[][..], |noted| &noted.dims);
        let least = if OF_MATRICES.contains(&op.as_str()) { 3 } else { 2 };
        let fits = |x: &Handle| {
            let input = shape(x);
            // What is no row stretches over rows where it has fewer axes, or one of length 1.
            let stretches = input.len() < dims.len() || input.first() == Some(&1);
            let alone = inputs.len() == 1;
            if of_rows.contains(&x.0) {
                is_of_rows(input) && input.len() >= least && (alone || input.len() == dims.len())
            } else {
                stretches
            }
        };
        if !is_of_rows(dims) || !inputs.iter().all(fits) {
            return None;
        }
    }
    Some(forward[..=last].iter().filter(|noted| looks_across(&noted.op)).count())
}

impl Running<'_> {
    /// An op is done; if it was the last one that looks from token to token, only the wanted rows of all tensors stay.
    pub fn keep_last_rows(&mut self, op: &str) -> candle_core::Result<()> {
        let Some(last) = self.last_rows.as_mut().filter(|last| last.left > 0 && looks_across(op)) else {
            return Ok(());
        };
        last.left -= 1;
        if last.left > 0 {
            return Ok(());
        }
        let rows = Tensor::from_slice(&last.rows, last.rows.len(), &self.place.device)?;
        self.arena.keep_rows(self.tokens, &rows)
    }

    /// How many rows the step has by now.
    pub fn rows(&self) -> usize {
        self.last_rows.as_ref().filter(|last| last.left == 0).map_or(self.tokens, |last| last.rows.len())
    }
}

/// These rows of what has `tokens` of them.
pub fn kept(value: &Value, tokens: usize, rows: &Tensor) -> candle_core::Result<Option<Value>> {
    match value {
        Value::Real(t) if t.rank() > 0 && t.dim(0)? == tokens => Ok(Some(Value::Real(t.index_select(rows, 0)?))),
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKENS: usize = 7;

    /// Ops by their names, what they take (numbers of ops before) and their shapes; the step's tokens are number 0.
    fn notes(ops: &[(&str, &[u64], &[usize])]) -> Vec<Noted> {
        let tokens = [("tokens", &[][..], &[TOKENS][..])];
        let rows = [("rows", &[ops.len() as u64][..], &[TOKENS, 16][..])];
        let noted = |(i, &(op, takes, dims)): (usize, &(&str, &[u64], &[usize]))| Noted {
            op: op.to_owned(),
            slot: None,
            said: takes.iter().map(|&x| Word::Tensor(Handle(x + 1))).collect(),
            gives: Handle(i as u64 + 1),
            dims: dims.to_vec(),
        };
        tokens.iter().chain(ops).chain(&rows).enumerate().map(noted).collect()
    }

    #[test]
    fn a_step_goes_on_with_fewer_rows_behind_its_last_attention() {
        let layer = [
            ("embed", &[0][..], &[TOKENS, 16][..]),
            ("linear", &[1], &[TOKENS, 16]),
            ("split_heads", &[2], &[TOKENS, 2, 8]),
            ("attend", &[3, 3, 3], &[TOKENS, 2, 8]),
            ("merge_heads", &[4], &[TOKENS, 16]),
            ("linear", &[5], &[TOKENS, 16]),
            ("add", &[1, 6], &[TOKENS, 16]),
            ("parameter", &[], &[16]),
            ("mul", &[7, 8], &[TOKENS, 16]),
        ];
        assert_eq!(looks(&notes(&layer), TOKENS), Some(2), "embed, which is not known to keep to its rows, and attend");
        assert_eq!(looks(&notes(&layer[..3]), TOKENS), Some(1));
    }

    #[test]
    fn it_does_not_where_rows_cannot_be_told_from_other_axes() {
        let begin = [("embed", &[0][..], &[TOKENS, 16][..]), ("attend", &[1], &[TOKENS, 16])];
        let with = |ops: &[(&str, &[u64], &[usize])]| looks(&notes(&[&begin, ops].concat()), TOKENS);
        assert_eq!(with(&[("neg", &[2], &[TOKENS, 16])]), Some(2));
        // A weight that has as many rows as the step has tokens.
        assert_eq!(with(&[("parameter", &[], &[TOKENS, 16]), ("add", &[2, 3], &[TOKENS, 16])]), None);
        // Columns become rows, or rows a part of something else.
        assert_eq!(with(&[("transpose", &[2], &[16, TOKENS])]), None);
        assert_eq!(with(&[("flatten", &[2], &[TOKENS * 16])]), None);
        assert_eq!(with(&[("unflatten", &[2], &[TOKENS, TOKENS, 2]), ("add", &[3, 2], &[TOKENS, TOKENS, 16])]), None);
        // Each row stretched over all.
        assert_eq!(with(&[("parameter", &[], &[3, 1, 16]), ("mul", &[2, 3], &[3, TOKENS, 16])]), None);
        // A weight that stretches over rows.
        assert_eq!(with(&[("parameter", &[], &[1, 16]), ("mul", &[2, 3], &[TOKENS, 16])]), Some(2));
    }
}
