//! The config keys that pick between blocks: `hidden_act` and `layer_types`, as transformers writes them.

use crate::{
    Result, Tensor,
    config::{Json, Read},
    weights::MOST_LAYERS,
};

/// config.json's `hidden_act`, under the names that transformers gives to activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `silu`, also called `swish`
    Silu,
    /// `gelu`
    Gelu,
    /// `gelu_pytorch_tanh`, also called `gelu_new` and `gelu_fast`
    GeluTanh,
    /// `relu`
    Relu,
    /// `relu2`: max(x, 0)²
    Relu2,
}

impl Read for Activation {
    const WHAT: &'static str = "silu, gelu, gelu_pytorch_tanh, relu or relu2";
    fn read(json: &Json) -> Option<Self> {
        match json.as_str()? {
            "silu" | "swish" => Some(Self::Silu),
            "gelu" => Some(Self::Gelu),
            "gelu_pytorch_tanh" | "gelu_new" | "gelu_fast" => Some(Self::GeluTanh),
            "relu" => Some(Self::Relu),
            "relu2" | "relu_squared" => Some(Self::Relu2),
            _ => None,
        }
    }
}

/// config.json's `hidden_act` where an architecture's experts know SiLU alone: any other name is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SiluOnly;

impl Read for SiluOnly {
    const WHAT: &'static str = "silu, the only activation that this architecture knows";
    fn read(json: &Json) -> Option<Self> {
        matches!(json.as_str()?, "silu" | "swish").then_some(Self)
    }
}

impl Activation {
    /// The same shape. Thread: step.
    #[track_caller]
    pub fn forward(self, x: &Tensor) -> Tensor {
        match self {
            Self::Silu => x.silu(),
            Self::Gelu => x.gelu(),
            Self::GeluTanh => x.gelu_tanh(),
            Self::Relu => x.relu(),
            Self::Relu2 => x.relu().square(),
        }
    }
}

/// config.json's `layer_types`: which layers see all keys, and which only a window of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerTypes(Vec<bool>);

impl Read for LayerTypes {
    const WHAT: &'static str = "a list of full_attention and sliding_attention";
    fn read(json: &Json) -> Option<Self> {
        let slides = |kind: &Json| match kind.as_str()? {
            "full_attention" => Some(false),
            "sliding_attention" => Some(true),
            _ => None,
        };
        json.as_array()?.iter().map(slides).collect::<Option<_>>().map(Self)
    }
}

impl LayerTypes {
    /// Every `nth` of so many layers sees all keys, the others a window.
    pub fn every(nth: usize, layers: usize) -> Self {
        Self((1..=layers.min(MOST_LAYERS)).map(|layer| !layer.is_multiple_of(nth)).collect())
    }

    /// The last layer below `end` that is of this layer's kind: where a layer without keys of its own finds them.
    pub fn last_like(&self, layer: usize, end: usize) -> Result<usize> {
        let slides = self.slides(layer)?;
        let none =
            || format!("config.json: layer {layer} shares keys, but no layer of its type below {end} has any").into();
        self.0.iter().take(end).rposition(|&s| s == slides).ok_or_else(none)
    }

    /// Whether this layer, from 0, sees a window only. An error where the list ends before it.
    pub fn slides(&self, layer: usize) -> Result<bool> {
        let short = || {
            format!("config.json: layer_types has no entry for layer {layer}, it ends after {}", self.0.len()).into()
        };
        self.0.get(layer).copied().ok_or_else(short)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::key;

    fn layer_types(list: Json) -> Result<Option<LayerTypes>> {
        key(&Json::from_iter([("layer_types", list)]), "", "layer_types")
    }

    #[test]
    fn a_layer_slides_where_its_type_says_so() {
        let types = layer_types(["full_attention", "sliding_attention"].into_iter().collect()).unwrap().unwrap();
        assert_eq!((types.slides(0), types.slides(1)), (Ok(false), Ok(true)));
        assert_eq!(
            types.slides(2).unwrap_err().0,
            "config.json: layer_types has no entry for layer 2, it ends after 2"
        );
    }

    #[test]
    fn a_layer_without_keys_finds_the_last_one_of_its_kind_that_has_them() {
        let types = LayerTypes::every(3, 9);
        assert_eq!((types.last_like(6, 5), types.last_like(8, 5)), (Ok(4), Ok(2)));
        let error = types.last_like(8, 2).unwrap_err().0;
        assert_eq!(error, "config.json: layer 8 shares keys, but no layer of its type below 2 has any");
    }

    #[test]
    fn an_unknown_layer_type_or_activation_is_refused_with_the_known_ones() {
        let error = layer_types(["chunked_attention"].into_iter().collect()).unwrap_err().0;
        assert!(error.ends_with("it should be a list of full_attention and sliding_attention"), "{error}");
        let error = key::<Activation>(&Json::from_iter([("hidden_act", "mish")]), "", "hidden_act").unwrap_err().0;
        assert_eq!(
            error,
            "config.json: hidden_act is \"mish\", it should be silu, gelu, gelu_pytorch_tanh, relu or relu2"
        );
        let gelu = Json::from_iter([("hidden_act", "gelu")]);
        let error = key::<SiluOnly>(&gelu, "", "hidden_act").unwrap_err().0;
        assert!(error.ends_with("it should be silu, the only activation that this architecture knows"), "{error}");
    }
}
