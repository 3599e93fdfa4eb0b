#![allow(missing_docs, clippy::unwrap_used)]
use bitnet_core::{
    kernels::{self, packing::*},
    quant::activation::ActivationBuffer,
    threads::*,
};
use std::{convert::Infallible, time::Instant};
fn main() {
    let only: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let want = |s: &str| only.is_empty() || only.iter().any(|o| s.contains(o.as_str()));
    for threads in [1, 2] {
        if only.iter().any(|o| o == "t1") && threads == 2 {
            continue;
        }
        let mut pool = WorkerPool::new(threads);
        let bw = if want("limits") { kernels::limits::read_bytes_per_s(&mut pool) } else { 0.0 };
        println!("threads {threads} read {:.1} GB/s", bw / 1e9);
        for kernel in kernels::available().iter().skip(1) {
            let name = kernel.name().trim_start_matches("x86_64-");
            if !want(name) {
                continue;
            }
            let peak = kernels::limits::int8_macs_per_s(*kernel, &mut pool);
            println!("{name} peak {:.0} GMAC/s", peak / 1e9);
            for &layout in kernel.layouts() {
                if only.iter().any(|o| o.contains("bit")) && !want(layout.name()) {
                    continue;
                }
                for (cols, rows) in [(2560usize, 98_304usize * 4), (6912, 32_768 * 4)] {
                    let decode = |row: usize, codes: &mut [i8]| {
                        for (i, c) in codes.iter_mut().enumerate() {
                            *c = ((row * 7 + i * 13 + (i * i * row) % 11) % 3) as i8 - 1;
                        }
                        Ok::<(), Infallible>(())
                    };
                    let Ok(w) = PackedTernary::pack(rows, cols, 1.0, layout, &mut pool, &decode);
                    let mut line = format!("{name:11} {:7} K={cols} ", layout.name());
                    for n in [1usize, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 512] {
                        if !want(&format!("n{n},")) && only.iter().any(|o| o.starts_with('n')) {
                            continue;
                        }
                        let rows = if n > 12 { 1280 } else { rows };
                        let mut x = ActivationBuffer::new(n, cols);
                        for t in 0..n {
                            x.quantize_row(
                                t,
                                &(0..cols).map(|i| ((i * 31 + t * 7) % 255) as f32 - 127.0).collect::<Vec<_>>(),
                            );
                        }
                        let mut out = vec![0f32; n * rows];
                        let mut times = vec![];
                        let begin = Instant::now();
                        let (mut at, win) =
                            (0, if n <= 12 { (1 << 24) / layout.panel_bytes(cols) * 32 / 64 * 64 } else { rows });
                        while times.len() < 4 || begin.elapsed().as_millis() < 150 {
                            if at + win > rows {
                                at = 0;
                            }
                            let start = Instant::now();
                            let ww = n * win;
                            let shared = SharedColumns::new(&mut out[..ww], win, ROW_TILE);
                            pool.run(&|worker| {
                                let share = worker.share(win, ROW_TILE);
                                let mut cols_out = shared.claim(share.clone());
                                let share = at + share.start..at + share.end;
                                if n == 1 {
                                    kernel.gemv(&w.slice(share), &x.view(1, cols), cols_out.row_mut(0));
                                } else {
                                    kernel.gemm(&w.slice(share), &x.view(n, cols), &mut cols_out);
                                }
                            });
                            times.push(start.elapsed().as_secs_f64());
                            at += win;
                        }
                        times.sort_by(f64::total_cmp);
                        let best = times[times.len() / 8];
                        let rows = win;
                        let bytes = layout.panel_bytes(cols) * rows / 32;
                        line += &format!(
                            "| n{n} {:.0}G {:.1}GB/s {:.2}ms ",
                            (rows * cols * n) as f64 / best / 1e9,
                            bytes as f64 / best / 1e9,
                            best * 1e3 * 2084.0 / (rows * cols) as f64 * 1e6
                        );
                    }
                    println!("{line}");
                }
            }
        }
    }
}
