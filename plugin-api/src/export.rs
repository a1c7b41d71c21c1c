//! `export_plugin!`: everything between an `Architecture` and the ABI. Compiled into the plugin, since only there can its panics be caught.

use crate::{
    Architecture, Model, Step, Tensor, Weights,
    abi::{
        self, CacheSpec, Ctx, Handle,
        checking::{Examples, Panics},
        extension::{Offer, Table},
        ops::OpsRef,
        root::{ERROR_ABI, ERROR_CONFIG, ERROR_PANIC, FactoryRef, Host, ModelFactory, ModelObject, PluginError},
    },
    cache::Places,
    config::FromConfig,
    tensor::Call,
};
use abi_stable::{
    StableAbi,
    abi_stability::abi_checking::{CheckingGlobals, check_layout_compatibility_with_globals},
    library::{CheckTypeLayout, LibHeader, RootModuleResult},
    prefix_type::PrefixTypeTrait,
    std_types::{RErr, RResult, RSlice, RStr, RString, RVec},
    type_layout::TypeLayout,
};
use std::{
    any::Any,
    cell::Cell,
    panic::{self, AssertUnwindSafe},
    sync::{
        Mutex, Once, PoisonError,
        atomic::{AtomicPtr, Ordering},
    },
};

fn error(code: u32, message: impl Into<RString>) -> PluginError {
    PluginError { code, message: message.into(), detail: RString::new() }
}

/// The last panic of all threads, for `dylm check`: what happens in `drop` or on a thread of the plugin's own is in no result.
static ANY_PANIC: Mutex<String> = Mutex::new(String::new());

extern "C" fn take_panic() -> RString {
    std::mem::take(&mut *ANY_PANIC.lock().unwrap_or_else(PoisonError::into_inner)).into()
}

thread_local! {
    static LAST_PANIC: Cell<Option<String>> = const { Cell::new(None) };
}

/// A panic in this very place would end the process, and what was thrown may itself panic when it is dropped.
fn discard(thrown: Box<dyn Any + Send>) {
    if let Err(worse) = panic::catch_unwind(AssertUnwindSafe(|| drop(thrown))) {
        std::mem::forget(worse);
    }
}

/// Runs `f`; a panic becomes an error that names the plugin.
fn catch<T>(name: &str, f: impl FnOnce() -> Result<T, PluginError>) -> RResult<T, PluginError> {
    match caught(f) {
        Ok(result) => result.into(),
        Err(text) => RErr(error(ERROR_PANIC, format!("the plugin {name} panicked: {text}"))),
    }
}

/// Runs `f`; a panic becomes its text and place, in one line. The plugin's own copy of the panic hook is silenced, once: it would
/// print to a terminal that belongs to the host.
pub(crate) fn caught<T>(f: impl FnOnce() -> T) -> Result<T, String> {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        panic::set_hook(Box::new(|info| {
            let text = info.payload_as_str().unwrap_or("a panic without text").to_owned();
            let place = info.location().map(|l| format!(" (at {}:{})", l.file(), l.line())).unwrap_or_default();
            let text = text + &place;
            ANY_PANIC.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&text);
            // Not there any more while a thread ends.
            let _ = LAST_PANIC.try_with(|p| p.set(Some(text)));
        }));
    });
    // The text of a panic that the plugin caught by itself is not the text of the next one.
    let _ = LAST_PANIC.try_with(Cell::take);
    match panic::catch_unwind(AssertUnwindSafe(f)) {
        Ok(value) => Ok(value),
        Err(thrown) => {
            let text = LAST_PANIC.try_with(Cell::take).ok().flatten();
            discard(thrown);
            // What assert_eq! says has several lines.
            let text = text.as_deref().unwrap_or("a panic without text");
            Err(text.lines().map(str::trim).collect::<Vec<_>>().join(", "))
        }
    }
}

/// Of the host's ops and those that this plugin was compiled with, either must be the beginning of the other, of the same types and in the
/// same order. Whether the host has enough of them it has read from the plugin's file; what is missing all the same fails when called.
fn check_ops(name: &str, host: &Host) -> Result<(), PluginError> {
    let (theirs, ours) = (host.layout, <OpsRef as StableAbi>::LAYOUT);
    // With a memory of its own: the one that all of the process shares takes two plugins of different minors for a contradiction.
    let begins = |of, with| check_layout_compatibility_with_globals(with, of, &CheckingGlobals::new());
    begins(theirs, ours).or_else(|long| begins(ours, theirs).map_err(|_| long)).map_err(|long| PluginError {
        code: ERROR_ABI,
        message: format!(
            "the plugin {name} knows ops in another form or order than this dylm; rebuild it with plugin-api {}.{}",
            abi::MAJOR,
            abi::MINOR
        )
        .into(),
        detail: long.to_string().into(),
    })
}

/// The same, once for each table: the comparison takes longer than most models take to be described, and leaves some memory behind.
fn know_ops(name: &str, host: &Host) -> Result<(), PluginError> {
    static KNOWN: AtomicPtr<TypeLayout> = AtomicPtr::new(std::ptr::null_mut());
    let layout = std::ptr::from_ref(host.layout).cast_mut();
    if KNOWN.load(Ordering::Relaxed) != layout {
        check_ops(name, host)?;
        KNOWN.store(layout, Ordering::Relaxed);
    }
    Ok(())
}

/// What `ModelObject::data` points to.
struct Built<M> {
    model: M,
    caches: RVec<CacheSpec>,
    places: Places,
}

/// What a plugin carries beside its code; `export_plugin!` says it.
#[doc(hidden)]
pub trait Carries {
    /// Texts of config.json.
    const EXAMPLES: &'static [RStr<'static>];
}

/// The ABI face of one architecture; `export_plugin!` names it once.
#[doc(hidden)]
pub struct Exported<A>(std::marker::PhantomData<A>);

impl<A: Architecture + Carries> Exported<A> {
    const EXAMPLES: &'static Table<Examples> = &Table::new(Examples { texts: RSlice::from_slice(A::EXAMPLES) });
    const PANICS: &'static Table<Panics> = &Table::new(Panics { take: take_panic });

    fn name() -> &'static str {
        A::MODEL_TYPES.first().copied().unwrap_or("without a model_type")
    }

    /// The root module.
    pub fn factory(note: &'static str) -> FactoryRef {
        ModelFactory { major: abi::MAJOR, note: note.into(), create: Self::create, extension: Self::extension }
            .leak_into_prefix()
    }

    extern "C" fn create(host: &Host, ctx: Ctx, config: RStr<'_>) -> RResult<ModelObject, PluginError> {
        catch(Self::name(), || {
            know_ops(Self::name(), host)?;
            let config = A::Config::from_text(config.as_str()).map_err(|e| error(ERROR_CONFIG, e.0))?;
            let call = Call::new(host, ctx);
            let model = call.enter(|| A::new(config, &Weights::default())).map_err(|e| error(ERROR_CONFIG, e.0))?;
            let (caches, places) = Places::of(model.caches());
            Ok(ModelObject {
                data: Box::into_raw(Box::new(Built { model, caches: caches.into(), places })).cast(),
                caches: Self::caches,
                forward: Self::forward,
                head: Self::head,
                drop: Self::drop,
                extension: Self::model_extension,
            })
        })
    }

    /// # Safety
    /// `data` is the pointer that `create` made, not yet given to `drop`.
    unsafe fn built<'a>(data: *const ()) -> &'a Built<A::Model> {
        // SAFETY: the caller's promise; `create` boxed exactly a `Built<A::Model>`.
        unsafe { &*data.cast::<Built<A::Model>>() }
    }

    extern "C" fn caches(data: *const ()) -> RVec<CacheSpec> {
        // SAFETY: the host passes `ModelObject::data` and drops it last.
        unsafe { Self::built(data) }.caches.clone()
    }

    extern "C" fn forward(data: *const (), host: &Host, ctx: Ctx, tokens: Handle) -> RResult<Handle, PluginError> {
        // SAFETY: as in `caches`.
        let built = unsafe { Self::built(data) };
        catch(Self::name(), || {
            Ok(Call::new(host, ctx).enter(|| {
                let mut step = Step { places: built.places.clone() };
                built.model.forward(&Tensor::own(tokens), &mut step).into_handle()
            }))
        })
    }

    extern "C" fn head(data: *const (), host: &Host, ctx: Ctx, hidden: Handle) -> RResult<Handle, PluginError> {
        // SAFETY: as in `caches`.
        let built = unsafe { Self::built(data) };
        catch(Self::name(), || Ok(Call::new(host, ctx).enter(|| built.model.head(&Tensor::own(hidden)).into_handle())))
    }

    extern "C" fn drop(data: *mut ()) {
        let _ = catch(Self::name(), || {
            // SAFETY: the host calls this once, last; `create` boxed exactly a `Built<A::Model>`.
            drop(unsafe { Box::from_raw(data.cast::<Built<A::Model>>()) });
            Ok(())
        });
    }

    extern "C" fn extension(id: RStr<'_>) -> *const () {
        let own = || Offer::named(&id, Self::EXAMPLES).or_else(|| Offer::named(&id, Self::PANICS));
        let offer = catch(Self::name(), || Ok(own().or_else(|| A::extension(id.as_str()))));
        offer.unwrap_or(None).map_or(std::ptr::null(), Offer::into_pointer)
    }

    extern "C" fn model_extension(data: *const (), id: RStr<'_>) -> *const () {
        // SAFETY: as in `caches`; an offer borrows from the model, which stays where it is until `drop`.
        let built = unsafe { Self::built(data) };
        let offer = catch(Self::name(), || Ok(built.model.extension(id.as_str())));
        offer.unwrap_or(None).map_or(std::ptr::null(), Offer::into_pointer)
    }
}

/// The header that a host looks for, over the constructor of the root module.
#[doc(hidden)]
pub const fn header(root_module: extern "C" fn() -> RootModuleResult) -> LibHeader {
    // SAFETY: `export_plugin!` is the only caller, and its constructor returns a `FactoryRef`.
    unsafe { LibHeader::from_constructor::<FactoryRef>(root_module, CheckTypeLayout::Yes) }
}

/// Makes a library into a plugin: `export_plugin!(Llama);`, once per crate. `export_plugin!(Llama, examples = ["config.json"])` carries
/// configurations for `dylm check` to try it with, small ones, as files named from the folder of the crate's Cargo.toml.
#[macro_export]
macro_rules! export_plugin {
    ($architecture:ty) => { $crate::export_plugin!($architecture, examples = []); };
    ($architecture:ty, examples = [$($file:literal),* $(,)?]) => {
        const _: () = {
            impl $crate::export::Carries for $architecture {
                const EXAMPLES: &'static [$crate::abi_stable::std_types::RStr<'static>] = &[
                    $($crate::abi_stable::std_types::RStr::from_str(
                        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/", $file))
                    )),*
                ];
            }

            const FACTS: $crate::abi::note::Facts<'static> = $crate::abi::note::Facts {
                name: env!("CARGO_PKG_NAME"),
                version: env!("CARGO_PKG_VERSION"),
                license: env!("CARGO_PKG_LICENSE"),
                url: env!("CARGO_PKG_REPOSITORY"),
                model_types: <$architecture as $crate::Architecture>::MODEL_TYPES,
                panic: if cfg!(panic = "unwind") { "unwind" } else { "abort" },
            };
            const LENGTH: usize = $crate::abi::note::measure(&FACTS);

            #[used]
            #[cfg_attr(target_vendor = "apple", unsafe(link_section = "__DATA,__dylm"))]
            #[cfg_attr(windows, unsafe(link_section = ".dylm"))]
            #[cfg_attr(not(any(windows, target_vendor = "apple")), unsafe(link_section = ".note.dylm"))]
            static NOTE: $crate::abi::note::Note<LENGTH> = $crate::abi::note::Note::new(&FACTS);

            // A second copy, so that a note which somebody changed in the file no longer agrees with the code.
            static TEXT: [u8; LENGTH] = $crate::abi::note::write(&FACTS);

            extern "C" fn root_module() -> $crate::abi_stable::library::RootModuleResult {
                fn factory() -> $crate::abi::root::FactoryRef {
                    $crate::export::Exported::<$architecture>::factory(std::str::from_utf8(&TEXT).unwrap_or_default())
                }
                $crate::abi_stable::library::__call_root_module_loader(factory)
            }

            // The name carries the ABI's major number, so that hosts of another major find no plugin at all.
            #[unsafe(no_mangle)]
            #[allow(non_upper_case_globals)]
            static dylm_plugin_1: $crate::abi_stable::library::LibHeader = $crate::export::header(root_module);
        };
    };
}
