//! The ranks of a model as they meet: each brings its summand, and all leave with the sum. On CPUs the last to come adds up, always in
//! the order of the ranks, so that every rank has the same bits and every run too. A rank that fails lets the others go.

use crate::device::Placement;
use candle_core::{Result, Tensor, bail};
#[cfg(any(test, feature = "cuda"))]
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// What a rank that was let go by another's failure says.
pub const LET_GO: &str = "another device's part of the step failed";

/// How long ranks on GPUs have to come to the end of a step that failed.
#[cfg(feature = "cuda")]
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);

/// Where the ranks of one model meet.
pub struct Group {
    ranks: usize,
    meeting: Mutex<Meeting>,
    turned: Condvar,
    /// How often all ranks on GPUs have met, and how many have come since.
    #[cfg(any(test, feature = "cuda"))]
    rounds: AtomicUsize,
    #[cfg(any(test, feature = "cuda"))]
    arrived: AtomicUsize,
    #[cfg(feature = "cuda")]
    nccl: Option<super::nccl::Communicators>,
}

#[derive(Default)]
struct Meeting {
    given: Vec<Tensor>,
    here: Vec<usize>,
    sum: Option<Tensor>,
    round: u64,
    failed: bool,
}

impl Group {
    /// Of so many ranks, whose devices are the CPU.
    pub fn of(ranks: usize) -> Self {
        Group {
            ranks,
            meeting: Mutex::default(),
            turned: Condvar::new(),
            #[cfg(any(test, feature = "cuda"))]
            rounds: AtomicUsize::new(0),
            #[cfg(any(test, feature = "cuda"))]
            arrived: AtomicUsize::new(0),
            #[cfg(feature = "cuda")]
            nccl: None,
        }
    }

    /// Of ranks on these devices, which are of one kind.
    pub fn on(places: &[Placement]) -> crate::error::Result<Self> {
        #[allow(unused_mut)]
        let mut group = Group::of(places.len());
        #[cfg(feature = "cuda")]
        if places.iter().all(|place| place.device.is_cuda()) {
            group.nccl = Some(super::nccl::Communicators::on(places)?);
        }
        Ok(group)
    }

    /// Ranks.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    fn meeting(&self) -> MutexGuard<'_, Meeting> {
        self.meeting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The sum of what all ranks bring, on each of them. All must call this in the same order. Thread: the rank's own.
    pub fn sum(&self, rank: usize, x: Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(nccl) = &self.nccl {
            return self.together(|| nccl.sum(rank, &x));
        }
        let mut meeting = self.meeting();
        if meeting.failed {
            bail!("{LET_GO}");
        }
        let round = meeting.round;
        meeting.given.push(x);
        meeting.here.push(rank);
        if meeting.given.len() == self.ranks {
            let (given, here) = (std::mem::take(&mut meeting.given), std::mem::take(&mut meeting.here));
            let mut summands: Vec<(usize, Tensor)> = here.into_iter().zip(given).collect();
            summands.sort_by_key(|(rank, _)| *rank);
            let mut summands = summands.into_iter().map(|(_, x)| x);
            let first = summands.next();
            let sum = first.map(|first| summands.try_fold(first, |sum, x| sum + x)).transpose();
            meeting.failed = sum.is_err();
            meeting.sum = sum?;
            meeting.round += 1;
            self.turned.notify_all();
        }
        while meeting.round == round && !meeting.failed {
            meeting = self.turned.wait(meeting).unwrap_or_else(PoisonError::into_inner);
        }
        match &meeting.sum {
            // What was left of an earlier meeting is none of this one.
            Some(sum) if meeting.round != round => Ok(sum.clone()),
            _ => bail!("{LET_GO}"),
        }
    }

    /// Puts the sum of what all ranks of a group of GPUs bring in x's place, and adds a residual if there is one to be added to.
    #[cfg(feature = "cuda")]
    pub fn sum_into(&self, rank: usize, x: &Tensor, onto: Option<crate::kernels::cuda::sum::Onto<'_>>) -> Result<()> {
        match (&self.nccl, onto) {
            (Some(nccl), Some(onto)) => self.together(|| nccl.sum_onto(rank, x, onto)),
            (Some(nccl), None) => self.together(|| nccl.sum(rank, x)).map(|_| ()),
            (None, _) => bail!("a sum in place over ranks that are no GPUs"),
        }
    }

    /// Starts something on each rank's GPU that waits there for the other GPUs: when all ranks have come to it, and none goes on before all
    /// have started it. The driver lets nobody do certain things (pin memory, load a kernel) while a GPU is busy: a rank that did one
    /// would wait for a GPU that waits for what this rank has not started yet.
    #[cfg(any(test, feature = "cuda"))]
    pub fn together<T>(&self, start: impl FnOnce() -> Result<T>) -> Result<T> {
        self.meet()?;
        let started = start()?;
        self.meet()?;
        Ok(started)
    }

    /// Waits until all ranks are here. They come within microseconds of each other, so the thread stays awake.
    #[cfg(any(test, feature = "cuda"))]
    fn meet(&self) -> Result<()> {
        let round = self.rounds.load(Ordering::Acquire);
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.ranks {
            self.arrived.store(0, Ordering::Relaxed);
            self.rounds.store(round.wrapping_add(1), Ordering::Release);
            return Ok(());
        }
        let mut looks = 0u32;
        while self.rounds.load(Ordering::Acquire) == round {
            looks = looks.wrapping_add(1);
            if !looks.is_multiple_of(256) {
                std::hint::spin_loop();
            } else if self.meeting().failed {
                bail!("{LET_GO}");
            } else {
                std::thread::yield_now();
            }
        }
        Ok(())
    }

    /// Whether [`Self::sum_into`] writes squares for tensors like this.
    #[cfg(feature = "cuda")]
    pub fn writes_squares(&self, like: &Tensor) -> bool {
        self.nccl.as_ref().is_some_and(|nccl| nccl.writes_squares(like))
    }

    /// Lets everybody go who waits, and who comes until [`Self::renew`].
    pub fn fail(self: &Arc<Self>) {
        self.meeting().failed = true;
        self.turned.notify_all();
        #[cfg(feature = "cuda")]
        if self.nccl.is_some() {
            // Ranks fail together as a rule. One that waits on its GPU for another cannot hear of it, and is freed for good.
            let group = self.clone();
            std::thread::spawn(move || {
                std::thread::sleep(PATIENCE);
                if let Some(nccl) = group.nccl.as_ref().filter(|_| group.meeting().failed) {
                    nccl.abort();
                }
            });
        }
    }

    /// A new beginning, when no rank is on its way.
    pub fn renew(&self) {
        #[cfg(any(test, feature = "cuda"))]
        self.arrived.store(0, Ordering::Release);
        let mut meeting = self.meeting();
        *meeting = Meeting { round: meeting.round, ..Meeting::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn of(x: f32) -> Tensor {
        Tensor::new(&[x, 2.0 * x], &Device::Cpu).unwrap()
    }

    #[test]
    fn every_rank_leaves_with_the_sum_of_all_in_the_order_of_ranks() {
        let group = Group::of(3);
        // In another order the sum would be another.
        let parts = [1e8f32, -1e8, 1.0];
        for _ in 0..100 {
            let sums: Vec<Vec<f32>> = std::thread::scope(|scope| {
                let rank = |rank: usize| {
                    let (group, x) = (&group, parts[rank]);
                    scope.spawn(move || group.sum(rank, group.sum(rank, of(x)).unwrap()).unwrap().to_vec1().unwrap())
                };
                [2, 0, 1].map(rank).map(|thread| thread.join().unwrap()).into()
            });
            assert!(sums.iter().all(|sum| *sum == [3.0, 6.0]), "{sums:?}");
        }
    }

    #[test]
    fn a_rank_that_fails_lets_the_others_go_and_the_next_meeting_is_held() {
        let group = Arc::new(Group::of(2));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| group.sum(0, of(1.0)).unwrap_err().to_string());
            group.fail();
            assert!(waits.join().unwrap().contains(LET_GO));
        });
        group.renew();
        std::thread::scope(|scope| {
            let other = scope.spawn(|| group.sum(1, of(2.0)).unwrap());
            assert_eq!(group.sum(0, of(1.0)).unwrap().to_vec1::<f32>().unwrap(), [3.0, 6.0]);
            other.join().unwrap();
        });
    }

    #[test]
    fn what_waits_for_other_ranks_starts_when_all_have_come_and_none_goes_on_before() {
        let group = Group::of(3);
        let [came, started, wrong] = [(); 3].map(|()| AtomicUsize::new(0));
        // Who panicked here would keep the others waiting.
        let hold = |right: bool| wrong.fetch_add(usize::from(!right), Ordering::SeqCst);
        let rank = || {
            for all in (1..=500).map(|round| 3 * round) {
                came.fetch_add(1, Ordering::SeqCst);
                let start = || {
                    hold(came.load(Ordering::SeqCst) >= all);
                    Ok(started.fetch_add(1, Ordering::SeqCst))
                };
                hold(group.together(start).is_ok());
                hold(started.load(Ordering::SeqCst) >= all);
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(rank);
            }
        });
        assert_eq!(wrong.into_inner(), 0);
    }

    #[test]
    fn a_rank_that_does_not_come_lets_go_who_waits_to_start_and_the_next_time_all_start() {
        let group = Arc::new(Group::of(2));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| group.together(|| Ok(())).unwrap_err().to_string());
            while group.arrived.load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
            group.fail();
            assert!(waits.join().unwrap().contains(LET_GO));
        });
        group.renew();
        std::thread::scope(|scope| {
            let other = scope.spawn(|| group.together(|| Ok(2)).unwrap());
            assert_eq!([group.together(|| Ok(1)).unwrap(), other.join().unwrap()], [1, 2]);
        });
    }
}
