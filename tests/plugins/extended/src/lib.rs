//! A plugin that offers extensions, of its architecture and of each model, and asks the host for some.

use plugin_api::{
    abi::{
        extension::{Extension, Offer, Table, of_host},
        own_op::OwnOps,
    },
    prelude::*,
};

config! {
    struct Config {
        vocab_size: usize,
        hidden_size: usize,
    }
}

/// A later version of a struct, of which the test knows the first field.
#[repr(C)]
#[derive(Clone, Copy)]
struct Languages {
    count: u64,
    dialects: u64,
}

// SAFETY: `repr(C)`, numbers.
unsafe impl Extension for Languages {
    const ID: &'static str = "example.org:languages/1";
    const FIRST: usize = std::mem::offset_of!(Languages, dialects);
}

static LANGUAGES: Table<Languages> = Table::new(Languages { count: 3, dialects: 11 });

/// What a model says of itself, a function among it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Size {
    numbers: u64,
    double: extern "C" fn(u64) -> u64,
}

// SAFETY: `repr(C)`, a number and a function, both there from the first version on.
unsafe impl Extension for Size {
    const ID: &'static str = "example.org:size/1";
}

extern "C" fn double(n: u64) -> u64 {
    2 * n
}

/// What no host offers.
#[derive(Clone, Copy)]
#[repr(C)]
struct Nothing(u64);

// SAFETY: a number.
unsafe impl Extension for Nothing {
    const ID: &'static str = "example.org:nothing/1";
}

struct Extended {
    embed_tokens: Embedding,
    norm: RmsNorm,
    lm_head: Linear,
    size: Table<Size>,
}

impl Architecture for Extended {
    const MODEL_TYPES: &'static [&'static str] = &["extended"];
    type Config = Config;
    type Model = Self;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        if of_host::<OwnOps>().is_none() || of_host::<Nothing>().is_some() {
            return Err("the host has op/1 and nothing of example.org".into());
        }
        w.ignore("model.layers");
        Ok(Self {
            embed_tokens: w.embedding("model.embed_tokens", c.vocab_size, c.hidden_size),
            norm: w.rms_norm("model.norm", c.hidden_size, 1e-5),
            lm_head: w.linear("lm_head", c.hidden_size, c.vocab_size, false),
            size: Table::new(Size { numbers: (c.vocab_size * c.hidden_size) as u64, double }),
        })
    }

    fn extension(id: &str) -> Option<Offer<'static>> {
        if id == "example.org:panic/1" {
            panic!("a deliberate panic in extension");
        }
        Offer::named(id, &LANGUAGES)
    }
}

impl Model for Extended {
    fn caches(&self) -> Vec<Cache> {
        Vec::new()
    }

    fn forward(&self, tokens: &Tensor, _: &mut Step) -> Tensor {
        if of_host::<Nothing>().is_some() {
            return Tensor::failed("the host has nothing of example.org");
        }
        self.norm.forward(&self.embed_tokens.forward(tokens))
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.lm_head.forward(hidden)
    }

    fn extension(&self, id: &str) -> Option<Offer<'_>> {
        Offer::named(id, &self.size)
    }
}

export_plugin!(Extended);
