//! A plan and the devices it is to run on -> a model: the weights are read, on several devices each rank's own share of them.

use super::{Model, Plan, engine::Engine};
use crate::{
    adapter::Adapters,
    device::{DeviceChoice, DtypeChoice, Placement},
    error::{Error, Result},
    layers::Layer,
    ops::{building::Building, lending::Call, value::Value},
    parallel::{
        cut::Division,
        group::Group,
        ranks::{Followers, Seat},
        trace::graph,
    },
    plugin::library::Object,
    weights::{load::Loader, plan::Wanted},
};
use candle_core::DType;
use rayon::prelude::*;
use std::{
    cell::RefCell,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

impl Plan {
    /// Reads the weights. `progress` is called with the number of slots done and of all.
    pub fn load(
        self,
        place: Placement,
        adapters: &Adapters,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<Model> {
        self.load_on(vec![place], adapters, progress)
    }

    /// The same on several devices, tensor parallel. Each holds a share of the weights that can be cut, and all of the others.
    ///
    /// # Errors
    /// If there is nothing in the model that so many devices can share.
    pub fn load_on(
        self,
        places: Vec<Placement>,
        adapters: &Adapters,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<Model> {
        self.report.clone().into_result(&self.config.model_type)?;
        if let Some((name, tensor)) = self.pantry.checkpoint.iter().find(|(_, tensor)| !tensor.is_here()) {
            let file = tensor.file.display();
            return Err(Error::Weights(format!("{file}: only the header was fetched, {name} cannot be read")));
        }
        self.dry_run()?;
        let ranks = places.len();
        let counted = Progress { done: AtomicUsize::new(0), all: ranks * self.wanted.len(), tell: progress };
        let Ok([place]) = <[Placement; 1]>::try_from(places.clone()) else {
            return self.share_out(places, adapters, &counted);
        };
        let layers = self.layers(&self.wanted, &place, adapters, &counted)?;
        adapters.refuse_unused()?;
        Ok(self.into_model(place, layers))
    }

    /// The slots of one device, read.
    #[allow(unused_mut)]
    fn layers(&self, wanted: &[Wanted], place: &Placement, adapters: &Adapters, of: &Progress) -> Result<Vec<Layer>> {
        let loader = Loader { pantry: &self.pantry, place, adapters };
        let load = |wanted: &Wanted| {
            let layer = loader.load(wanted);
            (of.tell)(of.done.fetch_add(1, Ordering::Relaxed) + 1, of.all);
            layer
        };
        let mut layers = wanted.par_iter().map(load).collect::<Result<Vec<_>>>()?;
        #[cfg(feature = "cuda")]
        crate::kernels::cuda::together::join(&mut layers, &self.together);
        Ok(layers)
    }

    fn into_model(self, place: Placement, layers: Vec<Layer>) -> Model {
        let Plan { config, note: plugin, object, wanted, .. } = self;
        Model {
            config,
            place,
            plugin,
            object,
            watch: None,
            wanted,
            layers,
            seat: None,
            followers: None,
            division: None,
            begun: Default::default(),
            looks: Default::default(),
            compiled: Default::default(),
            #[cfg(feature = "cuda")]
            replays: Default::default(),
        }
    }

    fn share_out(self, places: Vec<Placement>, adapters: &Adapters, of: &Progress) -> Result<Model> {
        let ranks = places.len();
        let division = self.division(ranks, adapters)?;
        let (cut, all) = division.count(&self.wanted);
        if cut == 0 {
            return Err(Error::Usage(format!(
                "--devices: none of the {all} matrices of {} can be cut in {ranks}: its key heads, groups of packed weights or widths do \
                 not divide so; name fewer devices",
                self.config.model_type
            )));
        }
        let group = Arc::new(Group::on(&places)?);
        let mut models = Vec::with_capacity(ranks);
        for (rank, place) in places.iter().enumerate() {
            let (wanted, joins) = division.of_rank(&self.wanted, rank);
            let layers = self.layers(&wanted, place, adapters, of)?;
            let seat = Seat { group: group.clone(), rank, joins };
            models.push((wanted, layers, seat));
        }
        adapters.refuse_unused()?;
        let mut followers = Vec::with_capacity(ranks - 1);
        let mut models = models.into_iter();
        let first = models.next();
        for ((wanted, layers, seat), place) in models.zip(places.iter().skip(1)) {
            followers.push(Model {
                config: self.config.clone(),
                place: place.clone(),
                plugin: self.note.clone(),
                object: self.object_again()?,
                watch: None,
                wanted,
                layers,
                seat: Some(seat),
                followers: None,
                division: None,
                begun: Default::default(),
                looks: Default::default(),
                compiled: Default::default(),
                #[cfg(feature = "cuda")]
                replays: Default::default(),
            });
        }
        let (Some((wanted, layers, seat)), Some(place)) = (first, places.first()) else {
            return Err(Error::Usage("--devices names no device".into()));
        };
        let mut model = self.into_model(place.clone(), layers);
        (model.wanted, model.seat) = (wanted, Some(seat));
        model.followers = Some(Followers::start(group, followers)?);
        model.division = Some(format!("{ranks} devices share {cut} of {all} matrices; the others are on each of them"));
        Ok(model)
    }

    /// How so many devices share the weights.
    pub(crate) fn division(&self, ranks: usize, adapters: &Adapters) -> Result<Division> {
        let place = Placement::new(DeviceChoice::Cpu, DtypeChoice::Float32, DType::F32)?;
        let notes = RefCell::default();
        let engine = Engine { notes: Some(&notes), ..Engine::new(&self.object, &self.wanted, &[], &place) };
        engine.run(Vec::new(), Value::planned(&[3]), |all| Ok(Some(all.clone())))?;
        let changed: Vec<&str> = adapters.names().collect();
        Ok(Division::new(&graph(notes.into_inner()), &self.wanted, &self.pantry, ranks, &changed))
    }

    /// The names of the matrices and other tensors that so many devices share.
    pub fn shared(&self, ranks: usize) -> Result<Vec<String>> {
        Ok(self.division(ranks, &Adapters::default())?.names(&self.wanted))
    }

    /// The plugin's model once more: the ABI promises one one call at a time.
    fn object_again(&self) -> Result<Object> {
        let json = serde_json::Value::Object(self.config.json().clone());
        let call = Call::Building(RefCell::new(Building::new(&self.pantry, &json)));
        self.library.create(&call, &self.config.text())
    }
}

/// How far the reading is.
struct Progress<'a> {
    done: AtomicUsize,
    all: usize,
    tell: &'a (dyn Fn(usize, usize) + Sync),
}

impl Model {
    /// How several devices share the weights, in a sentence; `None` on one.
    pub fn division(&self) -> Option<&str> {
        self.division.as_deref()
    }

    /// Whether it runs on several devices.
    pub(crate) fn is_shared(&self) -> bool {
        self.followers.is_some()
    }
}
