//! Named extensions, both ways: what this host offers to plugins that ask, and asking a plugin or one of its models. The rules, and the
//! ids that there are, stand in `plugin_api::abi::extension`; null is an answer, not an error.

use super::library::{Library, Object};
use crate::ops::own_op::OWN_OPS;
use abi_stable::std_types::RStr;
use plugin_api::abi::extension::{self, Extension, Offer};
use std::sync::{
    PoisonError,
    atomic::{AtomicBool, Ordering},
};

static OLDER: AtomicBool = AtomicBool::new(false);

/// From here on this process offers no extensions, as a dylm before the first of them: for the test that plugins then say what they lack.
#[doc(hidden)]
pub fn play_host_without_extensions(older: bool) {
    OLDER.store(older, Ordering::SeqCst);
}

/// `Host::extension`.
pub(crate) extern "C" fn of_host(id: RStr<'_>) -> *const () {
    let offer = Offer::named(id.as_str(), &OWN_OPS).filter(|_| !OLDER.load(Ordering::Relaxed));
    offer.map_or(std::ptr::null(), Offer::into_pointer)
}

impl Library {
    /// What the plugin offers under this name, before any model is built; `None` if it has no such extension.
    pub fn extension<T: Extension>(&self) -> Option<T> {
        // SAFETY: the factory's answer to that very id; libraries stay open.
        unsafe { extension::read(self.factory.extension(T::ID)) }
    }
}

impl Object {
    /// What this model offers under this name; `None` if it has no such extension.
    pub fn extension<T: Extension>(&self) -> Option<T> {
        let object = self.object.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the model's answer to that very id; the model is not dropped while it is borrowed here.
        unsafe { extension::read((object.extension)(object.data, T::ID.into())) }
    }
}
