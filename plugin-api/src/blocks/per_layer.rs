//! Config keys that hold one value for all layers or a list of one for each.

use crate::{
    Result,
    config::{Json, Read},
};

/// One value for all layers, or one for each.
#[derive(Debug, Clone, PartialEq)]
pub enum PerLayer<T> {
    /// The same everywhere.
    All(T),
    /// One for each layer, in their order.
    Each(Vec<T>),
}

impl<T: Read> Read for PerLayer<T> {
    const WHAT: &'static str = T::WHAT;
    fn read(json: &Json) -> Option<Self> {
        match json.is_array() {
            true => Vec::read(json).map(Self::Each),
            false => T::read(json).map(Self::All),
        }
    }
}

impl<T: Clone> PerLayer<T> {
    /// The value of this layer, from 0; `key` is how config.json calls it. An error where the list ends before it.
    pub fn at(&self, layer: usize, key: &str) -> Result<T> {
        match self {
            Self::All(value) => Ok(value.clone()),
            Self::Each(list) => list.get(layer).cloned().ok_or_else(|| {
                format!("config.json: {key} has no entry for layer {layer}, it ends after {}", list.len()).into()
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::key;

    #[test]
    fn a_key_holds_one_number_for_all_layers_or_a_list() {
        let read =
            |json: Json| key::<PerLayer<usize>>(&Json::from_iter([("width", json)]), "", "width").unwrap().unwrap();
        assert_eq!(read(Json::from(7)).at(3, "width"), Ok(7));
        let list = read([4, 5].into_iter().collect());
        assert_eq!(list.at(1, "width"), Ok(5));
        let error = list.at(2, "width").unwrap_err().0;
        assert_eq!(error, "config.json: width has no entry for layer 2, it ends after 2");
    }
}
