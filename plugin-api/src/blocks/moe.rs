//! Mixtures of experts: the router, in the flavours that architectures have made of it, and the block around it.

use crate::{
    Experts, GatedMlp, Linear, Mlp, Parameter, Tensor,
    config::{Json, Read},
};

/// How a router turns its logits into scores; config.json's `scoring_func`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Score {
    /// Softmax over all experts, then the choice.
    Softmax,
    /// The choice, then softmax over the chosen.
    ChosenSoftmax,
    /// Sigmoid of each.
    Sigmoid,
    /// The root of softplus of each.
    SqrtSoftplus,
}

impl Read for Score {
    const WHAT: &'static str = "softmax, sigmoid or sqrtsoftplus";
    fn read(json: &Json) -> Option<Self> {
        match json.as_str()? {
            "softmax" => Some(Self::Softmax),
            "sigmoid" => Some(Self::Sigmoid),
            "sqrtsoftplus" => Some(Self::SqrtSoftplus),
            _ => None,
        }
    }
}

/// How a group of experts is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupScore {
    /// By its best expert.
    Best,
    /// By the sum of its best two.
    BestTwo,
}

/// Chooses each token's experts and their weights.
#[derive(Debug)]
pub struct Router {
    gate: Linear,
    top_k: usize,
    logit_scale: f32,
    score: Score,
    softcap: Option<f32>,
    correction: Option<Parameter>,
    groups: Option<(usize, usize, GroupScore)>,
    zeroed: bool,
    normalized: Option<f32>,
    scale: f32,
}

impl Router {
    /// The k best of these scores, weighted by them.
    pub fn by(score: Score, gate: Linear, top_k: usize) -> Self {
        Self { score, ..Self::softmax(gate, top_k) }
    }

    /// The k most probable of `softmax(x Wgate)`, weighted by their probabilities.
    pub fn softmax(gate: Linear, top_k: usize) -> Self {
        Self {
            gate,
            top_k,
            logit_scale: 1.0,
            score: Score::Softmax,
            softcap: None,
            correction: None,
            groups: None,
            zeroed: false,
            normalized: None,
            scale: 1.0,
        }
    }

    /// The k largest logits, weighted by the softmax over these k.
    pub fn chosen_softmax(gate: Linear, top_k: usize) -> Self {
        Self::by(Score::ChosenSoftmax, gate, top_k)
    }

    /// The k largest of `sigmoid(x Wgate)`, weighted by these.
    pub fn sigmoid(gate: Linear, top_k: usize) -> Self {
        Self::by(Score::Sigmoid, gate, top_k)
    }

    /// The k largest of `√softplus(x Wgate)`, weighted by these.
    pub fn sqrt_softplus(gate: Linear, top_k: usize) -> Self {
        Self::by(Score::SqrtSoftplus, gate, top_k)
    }

    /// Multiplies the logits, before anything else.
    pub fn logit_scale(self, logit_scale: f32) -> Self {
        Self { logit_scale, ..self }
    }

    /// `softcap * tanh(logits / softcap)`, before they become scores.
    pub fn softcap(self, softcap: Option<f32>) -> Self {
        Self { softcap, ..self }
    }

    /// A bias `[experts]` that takes part in the choice but not in the weights. <https://arxiv.org/abs/2408.15664>
    pub fn correction(self, bias: impl Into<Option<Parameter>>) -> Self {
        Self { correction: bias.into(), ..self }
    }

    /// Chooses among the experts of the best `kept` of `groups` groups only. <https://arxiv.org/abs/2405.04434>
    pub fn groups(self, groups: usize, kept: usize, by: GroupScore) -> Self {
        Self { groups: (groups > 1 && kept < groups).then_some((groups, kept, by)), ..self }
    }

    /// Experts of groups that are out count as 0, which beats those whose corrected score is below.
    pub fn zeroed_groups(self) -> Self {
        Self { zeroed: true, ..self }
    }

    /// Scales the weights to a sum of 1; `eps` joins the sum that divides.
    pub fn normalized(self, yes: bool, eps: f32) -> Self {
        Self { normalized: yes.then_some(eps), ..self }
    }

    /// Multiplies the weights at last.
    pub fn scale(self, scale: f32) -> Self {
        Self { scale, ..self }
    }

    /// x `[tokens, dim]` -> the chosen experts and their weights, `[tokens, k]` each. Thread: step.
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> (Tensor, Tensor) {
        self.choose(&self.gate.forward(x))
    }

    /// The same from the router's logits `[tokens, experts]`. Thread: step.
    #[track_caller]
    pub fn choose(&self, logits: &Tensor) -> (Tensor, Tensor) {
        let scores = self.scores(logits);
        let corrected = match &self.correction {
            Some(bias) => &scores + bias.tensor(),
            None => scores.clone(),
        };
        let (_, chosen) = self.within_groups(corrected).topk(self.top_k);
        let weights = self.weights(&scores, &chosen);
        (chosen, weights)
    }

    /// The weights `[tokens, k]` of experts that something else has chosen, ids `[tokens, k]`. Thread: step.
    #[track_caller]
    pub fn weigh(&self, x: &Tensor, chosen: &Tensor) -> Tensor {
        self.weights(&self.scores(&self.gate.forward(x)), chosen)
    }

    fn scores(&self, logits: &Tensor) -> Tensor {
        let logits = if self.logit_scale == 1.0 { logits.clone() } else { logits * self.logit_scale };
        let logits = match self.softcap {
            Some(cap) => (logits / cap).tanh() * cap,
            None => logits,
        };
        match self.score {
            Score::Softmax => logits.softmax(),
            Score::ChosenSoftmax => logits,
            Score::Sigmoid => logits.sigmoid(),
            Score::SqrtSoftplus => logits.softplus().sqrt(),
        }
    }

    fn weights(&self, scores: &Tensor, chosen: &Tensor) -> Tensor {
        let weights = scores.gather(chosen);
        let weights = if self.score == Score::ChosenSoftmax { weights.softmax() } else { weights };
        let weights = match self.normalized {
            Some(eps) => &weights / (weights.sum() + eps),
            None => weights,
        };
        if self.scale == 1.0 { weights } else { weights * self.scale }
    }

    /// Scores of experts in groups that are out fall below every other.
    fn within_groups(&self, scores: Tensor) -> Tensor {
        let Some((groups, kept, by)) = self.groups else { return scores };
        let grouped = scores.unflatten(groups);
        let of_group = match by {
            GroupScore::Best => grouped.max(),
            GroupScore::BestTwo => grouped.topk(2).0.sum(),
        };
        let stays = of_group.flatten().top_mask(kept);
        // [tokens, groups, 1]: 0 in the groups that stay, far below any score elsewhere.
        match self.zeroed {
            true => (grouped * stays.unflatten(groups)).flatten(),
            false => (grouped + ((stays - 1.0) * 1e9).unflatten(groups)).flatten(),
        }
    }
}

/// Routed experts, and beside them perhaps one that every token visits.
#[derive(Debug)]
pub struct Moe {
    router: Router,
    experts: Experts,
    shared: Option<GatedMlp>,
    shared_gate: Option<Linear>,
}

impl Moe {
    /// Routed experts alone.
    pub fn new(router: Router, experts: Experts) -> Self {
        Self { router, experts, shared: None, shared_gate: None }
    }

    /// And a shared expert.
    pub fn shared(self, shared: impl Into<Option<GatedMlp>>) -> Self {
        Self { shared: shared.into(), ..self }
    }

    /// The shared expert counts by `sigmoid(x W)`, W `[1, dim]`.
    pub fn shared_gate(self, gate: Linear) -> Self {
        Self { shared_gate: Some(gate), ..self }
    }

    /// `[tokens, dim]` -> `[tokens, dim]`. Thread: step.
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let (chosen, weights) = self.router.forward(x);
        self.run(x, &chosen, &weights)
    }

    /// The same with experts that something else has chosen, ids `[tokens, k]`. Thread: step.
    #[track_caller]
    pub fn forward_to(&self, x: &Tensor, chosen: &Tensor) -> Tensor {
        self.run(x, chosen, &self.router.weigh(x, chosen))
    }

    #[track_caller]
    fn run(&self, x: &Tensor, chosen: &Tensor, weights: &Tensor) -> Tensor {
        let routed = self.experts.forward(x, chosen, weights);
        match (&self.shared, &self.shared_gate) {
            (None, _) => routed,
            (Some(shared), None) => routed + shared.forward(x),
            (Some(shared), Some(gate)) => routed + shared.forward(x) * gate.forward(x).sigmoid(),
        }
    }
}

/// A feed-forward layer that is dense in some blocks and routed in others.
#[derive(Debug)]
pub enum Ffn {
    /// One for all tokens.
    Dense(GatedMlp),
    /// One for all tokens, without a gate.
    Plain(Mlp),
    /// Experts.
    Sparse(Moe),
}

impl Ffn {
    /// `[tokens, dim]` -> `[tokens, dim]`. Thread: step.
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> Tensor {
        match self {
            Ffn::Dense(mlp) => mlp.forward(x),
            Ffn::Plain(mlp) => mlp.forward(x),
            Ffn::Sparse(moe) => moe.forward(x),
        }
    }
}
