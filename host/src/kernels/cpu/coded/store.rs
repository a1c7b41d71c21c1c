//! Where a matrix is that is to be coded: as the checkpoint has it until the model is in use, then coded, or copied if
//! that is not worth while.

use super::code::Code;
use crate::{
    kernels::cpu::matrix::Matrix,
    weights::{
        bytes::Bytes,
        moving::{self, Later},
    },
};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

pub(super) struct Store {
    /// Until it is coded.
    matrix: Mutex<Option<Arc<Matrix>>>,
    /// `None` where it is not worth while: then the matrix stays.
    code: OnceLock<Option<Code>>,
}

/// A matrix at one time; it stays while this is held.
pub(in crate::kernels::cpu) enum Source<'a> {
    Lying(Arc<Matrix>),
    Coded(&'a Code),
}

impl Store {
    pub(super) fn lying(matrix: Matrix) -> Arc<Self> {
        let store = Arc::new(Self { matrix: Mutex::new(Some(Arc::new(matrix))), code: OnceLock::new() });
        moving::enqueue(&(store.clone() as Arc<dyn Later>));
        store
    }

    pub(super) fn is_settled(&self) -> bool {
        self.code.get().is_some()
    }

    pub(super) fn source(&self) -> Source<'_> {
        loop {
            if let Some(Some(code)) = self.code.get() {
                return Source::Coded(code);
            }
            // It goes only when there is a code.
            if let Some(matrix) = &*self.matrix.lock().unwrap_or_else(PoisonError::into_inner) {
                return Source::Lying(matrix.clone());
            }
        }
    }
}

impl Later for Store {
    fn bytes(&self) -> usize {
        match self.source() {
            Source::Lying(matrix) => matrix.bytes(),
            Source::Coded(_) => 0,
        }
    }

    fn may_stay(&self) -> bool {
        true
    }

    fn lying(&self) -> Vec<Bytes> {
        match self.source() {
            Source::Lying(matrix) => matrix.parts().to_vec(),
            Source::Coded(_) => Vec::new(),
        }
    }

    fn go(&self, _: bool) -> std::io::Result<()> {
        let (None, Source::Lying(matrix)) = (self.code.get(), self.source()) else { return Ok(()) };
        let code = Code::of(&matrix)?;
        let instead = if code.is_none() { Some(Arc::new(matrix.moved()?)) } else { None };
        let _ = self.code.set(code);
        *self.matrix.lock().unwrap_or_else(PoisonError::into_inner) = instead;
        Ok(())
    }
}
