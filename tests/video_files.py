"Helpers of the tests that read videos: write any kind of file, change it, decode it plainly."

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F

H264 = dict(codec="libx264", bf="3", g="12", crf="20")
VP9 = dict(codec="libvpx-vp9", deadline="realtime", cpu_used="8", g="12", b="1M")
MPEG4 = dict(codec="mpeg4", bf="2", g="12", qscale="4", sc_threshold="1000000000")
OPEN_GROUPS = dict(H264, x264_params="open-gop=1:b-adapt=0:scenecut=0")


def one_line(error, *parts):
    "The message of an error that pytest caught: one line that holds these parts."
    message = str(error.value)
    assert "\n" not in message and all(str(part) in message for part in parts), message
    return message


def drifting(n, height=48, width=64):
    "RGB frames (n, height, width, 3) uint8, no two alike: a texture drifts, a square flies."
    coarse = np.random.default_rng(0).random((1, 3, 28, 32), np.float32)
    texture = F.interpolate(torch.from_numpy(coarse), scale_factor=8, mode="bicubic")[0]
    texture = (texture.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    side = max(height // 3, 1)
    video = np.empty((n, height, width, 3), np.uint8)
    for t, picture in enumerate(video):
        y, x = int(60 + 50 * np.sin(t / 7)), int(60 + 50 * np.cos(t / 9))
        picture[:] = texture[y : y + height, x : x + width]
        top, left = 3 * t % max(height - side, 1), 5 * t % max(width - side, 1)
        picture[top : top + side, left : left + side] = 230, 30, 60
    return video


def encode(
    path: Path,
    frames,  # (n, height, width, 3) uint8, or a clip (3, T, H, W) in [0, 1]
    codec: str,
    pix_fmt: str = "yuv420p",
    times=None,  # of the frames, in hundredths of a second
    convert: dict | None = None,  # of `VideoFrame.reformat`
    context: dict | None = None,  # attributes of the codec context
    container: dict | None = None,  # options of the container
    **options,  # of the encoder
):
    "Write frames with any codec."
    if torch.is_tensor(frames):
        frames = (frames * 255).byte().permute(1, 2, 3, 0).numpy()
    if "lib" in codec:
        options = {name.replace("_", "-"): value for name, value in options.items()}
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=Fraction(24), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        for name, value in (context or {}).items():
            setattr(stream.codec_context, name, value)
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 100)
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if convert:
                frame = frame.reformat(format=pix_fmt, **convert)
            if times is not None:
                frame.pts, frame.time_base = int(times[i]), Fraction(1, 100)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def remux(source, target, change, **options):
    "Copy packets; `change` maps a list of packets to a list of (content, pts, dts, key)."
    with av.open(str(source)) as file, av.open(str(target), "w", options=options) as out:
        stream = file.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for content, pts, dts, key in change([p for p in file.demux(stream) if p.size]):
            packet = av.Packet(content)
            packet.stream, packet.time_base = copy, stream.time_base
            packet.pts, packet.dts = pts, dts
            packet.is_keyframe = key
            out.mux(packet)
    return target


def earlier(ticks):
    "For `remux`: every packet so many ticks earlier; what falls before 0 is not shown."

    def change(packets):
        out = []
        for p in packets:
            dts = p.pts if p.dts is None else p.dts
            out.append((bytes(p), p.pts - ticks, dts - ticks, p.is_keyframe))
        return out

    return change


def all_keys(packets):
    "For `remux`: the container claims that every packet is a key frame."
    return [(bytes(p), p.pts, p.pts if p.dts is None else p.dts, True) for p in packets]


def plainly(path):
    "All frames as plain decoding from the start gives them, RGB."
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


def most_like(clip, truth):
    "Index of the most similar true frame, for every frame of a clip (3, T, H, W)."
    return (clip[:, :, None] - truth[:, None]).pow(2).mean((0, 3, 4)).argmin(1).tolist()
