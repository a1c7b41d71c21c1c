//! Adapters.
use crate::{
    device::Placement,
    error::Result,
    layers::{adapted::Adapter, weight::Weight},
};
/// Low-rank parts by module path.
#[derive(Default)]
pub struct Adapters;
impl Adapters {
    /// For a linear layer.
    pub fn linear(&self, _path: &str, _weight: &Weight, _place: &Placement) -> Result<Option<Adapter>> {
        Ok(None)
    }
    /// For an embedding.
    pub fn embedding(&self, _path: &str, _place: &Placement) -> Result<Option<Adapter>> {
        Ok(None)
    }
    /// For one expert of a stack.
    pub fn expert(&self, _path: &str, _expert: usize, _place: &Placement) -> Result<Option<Adapter>> {
        Ok(None)
    }
    /// Full weights in place of the checkpoint.
    pub fn overlay(&self, _c: &mut crate::weights::checkpoint::Checkpoint) -> Result<()> {
        Ok(())
    }
    /// From a folder.
    pub fn open(_p: &std::path::Path) -> Result<Self> {
        Ok(Self)
    }
    /// Adapters of layers that nobody asked for.
    pub fn refuse_unused(&self) -> Result<()> {
        Ok(())
    }
}
