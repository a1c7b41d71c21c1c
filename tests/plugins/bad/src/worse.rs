//! What no error value can tell of: it ends the process, never ends, or leaves something behind. `dylm check` finds each.

use plugin_api::prelude::*;
use std::{
    hint::black_box,
    mem::forget,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

/// Models made so far, which no model should know.
static MADE: AtomicUsize = AtomicUsize::new(0);
static KEPT: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

fn deeper(n: usize) -> usize {
    let here = black_box([n; 256]);
    if black_box(n) == usize::MAX { 0 } else { deeper(n + 1) + here[n % 256] }
}

fn keep(bytes: usize) {
    KEPT.lock().expect("no other thread panicked").push(vec![1; bytes]);
}

/// Anywhere.
pub fn anywhere(how: &str) {
    match how {
        "overflow the stack" => drop(black_box(deeper(0))),
        "never end" => loop {
            std::thread::sleep(Duration::from_millis(1));
        },
        "allocate for ever" => loop {
            keep(32 << 20);
        },
        "exit" => std::process::exit(0),
        "abort" => std::process::abort(),
        "use a null pointer" => drop(unsafe { std::ptr::read_volatile(black_box(std::ptr::null::<u8>())) }),
        _ => {}
    }
}

/// In `new`; gives how many layers more to ask for.
pub fn in_new(how: &str, divisor: usize, w: &Weights) -> Result<usize> {
    anywhere(how.strip_suffix(" in new").unwrap_or_default());
    match how {
        "ignore everything" => w.ignore(""),
        "leak a model" => keep(100),
        "refuse with a report" if divisor == 0 => return Err("config.json\nis not\nto my liking".into()),
        "count the models" => return Ok(MADE.fetch_add(1, Ordering::Relaxed)),
        _ => {}
    }
    Ok(0)
}

/// In `forward`; gives what it returns instead of the model's hidden states, where that is something else.
pub fn in_forward(how: &str, call: usize, h: &Tensor) -> Option<Tensor> {
    anywhere(how.strip_suffix(" in forward").unwrap_or_default());
    match how {
        "leak a tensor" => forget(h.exp()),
        "leak memory in forward" => keep(100),
        "print in forward" => println!("forward was here"),
        "complain in forward" => eprintln!("forward was there"),
        "leave a file open" => forget(std::fs::File::open(file!()).or(std::fs::File::open("/dev/null"))),
        "leave a thread running" => drop(std::thread::spawn(|| std::thread::sleep(Duration::from_secs(3600)))),
        "count the calls" if call % 5 == 3 => return Some(h + (h - h)),
        "drift" => return Some(h * (1.0 + call as f32)),
        "look ahead" => return Some(h.transpose().softmax().transpose() + h),
        "divide by zero" => return Some(h / (h - h)),
        "forget the text" => return Some((h - h) + 1.0),
        "hide a panic" => {
            let _ = std::panic::catch_unwind(|| panic!("a panic that nobody was to see"));
        }
        "compute off the thread, quietly" => drop(std::thread::spawn(|| drop(Tensor::failed("elsewhere"))).join()),
        _ => {}
    }
    None
}
