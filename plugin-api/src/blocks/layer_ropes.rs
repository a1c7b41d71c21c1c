//! config.json's `rope_parameters` where it has one set for layers that see all keys and one for layers with a window, as transformers 5
//! writes it. Each set says how fast, which share of the lanes, and how it is stretched.

use crate::{
    Rope, RopeScaling, Weights,
    config::{Json, Read},
};

/// Two ropes, by the kind of layer.
#[derive(Debug, Clone)]
pub struct LayerRopes {
    full_attention: Set,
    sliding_attention: Set,
}

#[derive(Debug, Clone)]
struct Set {
    rope_theta: f32,
    partial_rotary_factor: f32,
    scaling: RopeScaling,
}

impl Read for Set {
    const WHAT: &'static str = "an object with rope_theta";
    fn read(json: &Json) -> Option<Self> {
        let number = |key: &str| json.get(key).map(f32::read);
        let share = number("partial_rotary_factor").unwrap_or(Some(1.0))?;
        // The proportional kind spreads its frequencies over all lanes, and lets those beyond its share rest.
        let is_proportional = json.get("rope_type").is_some_and(|kind| kind == "proportional");
        Some(Self {
            rope_theta: number("rope_theta").unwrap_or(Some(10_000.0))?,
            partial_rotary_factor: if is_proportional { 1.0 } else { share },
            scaling: RopeScaling::read(json)?,
        })
    }
}

impl Read for LayerRopes {
    const WHAT: &'static str = "an object with full_attention and sliding_attention";
    fn read(json: &Json) -> Option<Self> {
        let set = |kind: &str| Set::read(json.get(kind)?);
        let full_attention = set("full_attention")?;
        Some(Self {
            sliding_attention: set("sliding_attention").unwrap_or_else(|| full_attention.clone()),
            full_attention,
        })
    }
}

impl LayerRopes {
    /// The rope of a layer that slides, or of one that sees all keys, for heads of `head_dim` lanes. Thread: new.
    #[track_caller]
    pub fn rope(&self, w: &Weights, head_dim: usize, slides: bool) -> Rope {
        let set = if slides { &self.sliding_attention } else { &self.full_attention };
        let dims = (head_dim as f32 * set.partial_rotary_factor) as usize;
        w.rope(dims, set.rope_theta, &Some(set.scaling.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_layer_has_its_own_set_and_a_missing_one_is_that_of_the_others() {
        let read = |text: &str| LayerRopes::read(&serde_json::from_str(text).unwrap());
        let both = r#"{"full_attention": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}, "sliding_attention": {"rope_theta": 100.0}}"#;
        let ropes = read(both).unwrap();
        assert_eq!((ropes.full_attention.rope_theta, ropes.full_attention.partial_rotary_factor), (5e5, 0.5));
        assert_eq!((ropes.sliding_attention.rope_theta, ropes.sliding_attention.partial_rotary_factor), (100.0, 1.0));
        let proportional =
            read(r#"{"full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5}}"#).unwrap();
        assert_eq!(proportional.full_attention.partial_rotary_factor, 1.0);
        assert_eq!(read(r#"{"full_attention": {"rope_theta": 7.0}}"#).unwrap().sliding_attention.rope_theta, 7.0);
        assert!(
            read(r#"{"rope_theta": 7.0}"#).is_none() && read(r#"{"full_attention": {"rope_theta": "x"}}"#).is_none()
        );
    }
}
