//! `quantization` in config.json -> how each layer's weights are packed. MLX writes it: one mode for the model, others (or
//! `false`, not packed) for single layers. What other tools write stands in `quantization_config` and is a [`Scheme`].

use super::{bad_key, scheme::Scheme};
use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::{collections::BTreeMap, fmt};

/// How values are coded within a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Integers with a scale and a bias for each group.
    Affine,
    /// E2M1 with a power of two for each 32 (OCP MX).
    Mxfp4,
    /// E4M3 with a power of two for each 32 (OCP MX).
    Mxfp8,
    /// E2M1 with an E4M3 scale for each 16 (NVIDIA).
    Nvfp4,
}

impl Kind {
    const ALL: [(Kind, &str); 4] =
        [(Kind::Affine, "affine"), (Kind::Mxfp4, "mxfp4"), (Kind::Mxfp8, "mxfp8"), (Kind::Nvfp4, "nvfp4")];

    // What MLX has kernels for, its default first.
    const fn bits(self) -> &'static [u32] {
        match self {
            Kind::Affine => &[4, 2, 3, 5, 6, 8],
            Kind::Mxfp4 | Kind::Nvfp4 => &[4],
            Kind::Mxfp8 => &[8],
        }
    }

    const fn groups(self) -> &'static [u32] {
        match self {
            Kind::Affine => &[64, 32, 128],
            Kind::Mxfp4 | Kind::Mxfp8 => &[32],
            Kind::Nvfp4 => &[16],
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::ALL.iter().find(|(kind, _)| kind == self).map_or("", |(_, name)| name))
    }
}

/// How one layer is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mode {
    /// Bits of one value.
    pub bits: u32,
    /// Values that share a scale, along the input.
    pub group: u32,
    /// The code.
    pub kind: Kind,
}

/// How a checkpoint is packed.
#[derive(Debug, Clone, PartialEq)]
pub enum Quantization {
    /// MLX's packing.
    Mlx {
        /// For every layer that has scales and is not listed.
        default: Mode,
        /// Layers with a mode of their own; `None` for layers that are not packed.
        paths: BTreeMap<String, Option<Mode>>,
    },
    /// Another tool's (`quant_method` `fp8`, `awq`, `gptq`, ..).
    Other(Scheme),
}

impl Quantization {
    pub(super) fn from_config(config: &Map<String, Value>, source: &str) -> Result<Option<Self>> {
        let there = |key: &str| config.get(key).filter(|v| !v.is_null());
        let (key, value) = match (there("quantization"), there("quantization_config")) {
            (Some(value), _) => ("quantization", value),
            (None, Some(value)) => ("quantization_config", value),
            (None, None) => return Ok(None),
        };
        let Value::Object(map) = value else {
            return Err(bad_key(source, key, value, "an object"));
        };
        if let (Some(method), "quantization_config") = (map.get("quant_method"), key) {
            let mx = |kind: Kind| {
                let default = Mode { bits: kind.bits()[0], group: kind.groups()[0], kind };
                Ok(Some(Quantization::Mlx { default, paths: BTreeMap::new() }))
            };
            return match method {
                // gpt-oss; whatever MLX saved of such a model is read the same way.
                Value::String(method) if method == "mxfp4" => mx(Kind::Mxfp4),
                Value::String(method) if method == "mxfp8" => mx(Kind::Mxfp8),
                Value::String(method) => Ok(Some(Quantization::Other(Scheme::from_config(method, map, source)?))),
                other => Err(bad_key(source, "quantization_config.quant_method", other, "a name")),
            };
        }
        let default = mode(map, key, source)?;
        let mut paths = BTreeMap::new();
        for (path, value) in map {
            let at = format!("{key}.{path}");
            match value {
                Value::Bool(false) => drop(paths.insert(path.clone(), None)),
                Value::Bool(true) => drop(paths.insert(path.clone(), Some(default))),
                Value::Object(own) => drop(paths.insert(path.clone(), Some(mode(own, &at, source)?))),
                // Numbers and names of the model's own mode, and whatever a later version adds to it.
                _ => {}
            }
        }
        Ok(Some(Quantization::Mlx { default, paths }))
    }

    /// How the layer `path` is packed if it is: its own mode or the model's; `Some(None)` where it is listed as not packed, `None` where
    /// another scheme packs the model.
    pub fn for_path(&self, path: &str) -> Option<Option<Mode>> {
        match self {
            Quantization::Mlx { default, paths } => Some(paths.get(path).copied().unwrap_or(Some(*default))),
            Quantization::Other(_) => None,
        }
    }

    /// The model's mode, for packed layers that are not listed.
    pub fn default_mode(&self) -> Option<Mode> {
        match self {
            Quantization::Mlx { default, .. } => Some(*default),
            Quantization::Other(_) => None,
        }
    }
}

fn mode(map: &Map<String, Value>, at: &str, source: &str) -> Result<Mode> {
    let kind = match map.get("mode") {
        None | Some(Value::Null) => Kind::Affine,
        Some(name) => match Kind::ALL.iter().find(|(_, known)| name.as_str() == Some(known)) {
            Some((kind, _)) => *kind,
            None => return Err(bad_key(source, &format!("{at}.mode"), name, "affine, mxfp4, mxfp8 or nvfp4")),
        },
    };
    Ok(Mode {
        bits: choose(map, "bits", kind.bits(), kind, at, source)?,
        group: choose(map, "group_size", kind.groups(), kind, at, source)?,
        kind,
    })
}

fn choose(map: &Map<String, Value>, key: &str, allowed: &[u32], kind: Kind, at: &str, source: &str) -> Result<u32> {
    let Some(value) = map.get(key).filter(|v| !v.is_null()) else {
        return Ok(allowed[0]);
    };
    let found = value.as_u64().and_then(|n| allowed.iter().find(|&&a| u64::from(a) == n));
    found.copied().ok_or_else(|| {
        let mut list = allowed.to_vec();
        list.sort_unstable();
        let list: Vec<String> = list.iter().map(u32::to_string).collect();
        let list = match list.split_last() {
            Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
            _ => list.concat(),
        };
        Error::Config(format!("{source}: {at}.{key} is {value}: {kind} takes {list}"))
    })
}
