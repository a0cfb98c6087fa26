"""Images of every kind are decoded upright to RGB, or refused with a reason."""

import struct
import zlib

import numpy as np
import pytest
import torch
from data_fixtures import photo
from PIL import Image, ImageCms

from fluxfast.data.images import UnreadableImage, discover, image_size, load_image, to_tensor

RNG = np.random.default_rng(0)


def pixels(img):
    assert img.mode == "RGB"
    return np.asarray(img).astype(int)


def noise(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


class TestDiscover:
    def test_recursive_sorted_suffixes_of_any_case(self, tmp_path):
        wanted = [
            touch(tmp_path / name) for name in ("B.JPG", "a.png", "sub/deep/c.WebP", "sub/d.tiff")
        ]
        for name in ("notes.txt", "a.json", "clip.mp4", "png"):
            touch(tmp_path / name)
        assert discover(tmp_path).images == sorted(wanted)

    def test_images_of_other_kinds_are_apart(self, tmp_path):
        wanted = touch(tmp_path / "a.png")
        other = [touch(tmp_path / name) for name in ("IMG.DNG", "old.psd", "sub/b.svg")]
        for name in ("a.txt", ".c.psd", "skip/d.psd"):
            touch(tmp_path / name)
        assert discover(tmp_path, skip=[tmp_path / "skip"]) == ([wanted], sorted(other))

    def test_a_folder_that_cannot_be_looked_into_is_named(self, tmp_path, monkeypatch):
        (tmp_path / "locked").mkdir()

        def refuse(path):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(type(tmp_path), "iterdir", refuse)
        with pytest.raises(
            ValueError, match=f"{tmp_path}: can't be looked into: Permission denied"
        ):
            discover(tmp_path)

    def test_hidden_and_skipped_folders_are_left_out(self, tmp_path):
        touch(tmp_path / ".hidden.png")
        touch(tmp_path / "._a.png")
        touch(tmp_path / ".cache" / "b.png")
        touch(tmp_path / "cache" / "vae" / "c.png")
        wanted = touch(tmp_path / "other" / "vae" / "d.png")
        assert discover(tmp_path, skip=[tmp_path / "cache" / ".." / "cache"]).images == [wanted]

    def test_link_loops_end_and_no_image_comes_twice(self, tmp_path):
        wanted = touch(tmp_path / "real" / "a.png")
        (tmp_path / "real" / "up").symlink_to(tmp_path)
        (tmp_path / "again").symlink_to(tmp_path / "real")
        (tmp_path / "self").symlink_to(tmp_path / "self")
        assert discover(tmp_path).images == [wanted]

    def test_links_to_folders_and_files_are_followed(self, tmp_path):
        touch(tmp_path / "elsewhere" / "a.png")
        root = tmp_path / "root"
        root.mkdir()
        (root / "linked").symlink_to(tmp_path / "elsewhere")
        (root / "b.png").symlink_to(tmp_path / "elsewhere" / "a.png")
        assert discover(root).images == [root / "b.png", root / "linked" / "a.png"]

    def test_a_dangling_link_is_listed_to_be_reported(self, tmp_path):
        link = tmp_path / "gone.png"
        link.symlink_to(tmp_path / "nowhere.png")
        (tmp_path / "round.png").symlink_to(tmp_path / "round.png")
        assert discover(tmp_path).images == [link, tmp_path / "round.png"]
        with pytest.raises(UnreadableImage, match="the link points nowhere"):
            load_image(link)
        with pytest.raises(UnreadableImage, match=r"round\.png"):
            load_image(tmp_path / "round.png")

    def test_a_missing_folder_is_named(self, tmp_path):
        with pytest.raises(ValueError, match="nowhere: no such folder"):
            discover(tmp_path / "nowhere")


class TestLoad:
    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("suffix", ["png", "tif", "jpg", "webp"])
    def test_orientation(self, tmp_path, suffix, orientation):
        upright = noise(40, 24, 3)
        # how the camera stored what the tag then turns upright: EXIF 2.3, 4.6.4, tag 274
        stored = {
            1: upright,
            2: upright[:, ::-1],
            3: upright[::-1, ::-1],
            4: upright[::-1],
            5: upright.swapaxes(0, 1),
            6: np.rot90(upright, 1),
            7: np.rot90(upright, 2).swapaxes(0, 1),
            8: np.rot90(upright, -1),
        }[orientation]
        exif = Image.Exif()
        exif[0x112] = orientation
        path = tmp_path / f"a.{suffix}"
        options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(
            suffix, {}
        )
        Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **options)
        loaded = load_image(path)
        # JPEG at its best quality is within a few steps
        assert np.abs(pixels(loaded) - upright).max() <= (8 if suffix == "jpg" else 0)
        assert image_size(path) == loaded.size == (24, 40)

    def test_damaged_exif_is_no_reason_to_lose_the_image(self, tmp_path):
        Image.fromarray(noise(8, 9, 3)).save(tmp_path / "a.jpg", exif=b"Exif\0\0garbage, garbage")
        assert load_image(tmp_path / "a.jpg").size == (9, 8)

    @pytest.mark.parametrize("mode", ["RGBA", "LA"])
    def test_alpha_is_laid_on_white(self, tmp_path, mode):
        channels = noise(9, 11, len(mode))
        channels[0, 0, -1], channels[0, 1, -1] = 0, 255
        Image.fromarray(channels, mode).save(tmp_path / "a.png")
        alpha = channels[..., -1:] / 255
        expected = channels[..., :-1] * alpha + 255 * (1 - alpha)
        # alpha_composite rounds twice
        assert np.abs(pixels(load_image(tmp_path / "a.png")) - expected).max() <= 1.5

    @pytest.mark.parametrize("mode", ["L", "RGB", "1"])
    def test_a_transparent_colour_is_white(self, tmp_path, mode):
        img = Image.fromarray(noise(9, 11, 3)).convert(mode)
        black = 0 if mode != "RGB" else (0, 0, 0)
        img.putpixel((3, 4), black)
        img.save(tmp_path / "a.png", transparency=black)
        loaded = pixels(load_image(tmp_path / "a.png"))
        expected = pixels(img.convert("RGB"))
        expected[(expected == 0).all(-1)] = 255
        assert (loaded == expected).all()

    def test_palette_with_and_without_transparency(self, tmp_path):
        img = Image.fromarray(noise(9, 11, 3)).quantize(16)
        img.save(tmp_path / "plain.png")
        img.save(tmp_path / "alpha.png", transparency=bytes([0, 255, 128] + [255] * 13))
        colours = pixels(img.convert("RGB"))
        assert (pixels(load_image(tmp_path / "plain.png")) == colours).all()
        index = np.asarray(img)
        alpha = np.where(index == 0, 0, np.where(index == 2, 128 / 255, 1))[..., None]
        expected = colours * alpha + 255 * (1 - alpha)
        assert np.abs(pixels(load_image(tmp_path / "alpha.png")) - expected).max() <= 1.5

    @pytest.mark.parametrize("suffix", ["png", "tif"])
    def test_16_bit_grey_is_scaled(self, tmp_path, suffix):
        samples = RNG.integers(0, 65536, (9, 11), dtype=np.uint16)
        samples[0, :3] = 0, 65535, 32768
        Image.fromarray(samples).save(tmp_path / f"a.{suffix}")
        loaded = pixels(load_image(tmp_path / f"a.{suffix}"))
        assert (loaded == np.rint(samples / 257)[..., None]).all()

    def test_16_bit_grey_keeps_its_transparent_value(self, tmp_path):
        samples = np.array([[0, 1000, 40000]], dtype=np.uint16)
        Image.fromarray(samples).save(tmp_path / "a.png", transparency=1000)
        assert pixels(load_image(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 255, 156]

    def test_16_bit_colour_is_scaled(self, tmp_path):
        # Pillow can't write one: a PNG with colour type 2, depth 16, one filter byte a row
        samples = RNG.integers(0, 65536, (5, 7, 3), dtype=np.uint16)
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
        chunks = {
            b"IHDR": struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0),
            b"IDAT": zlib.compress(rows),
            b"IEND": b"",
        }
        png = b"\x89PNG\r\n\x1a\n" + b"".join(
            png_chunk(kind, data) for kind, data in chunks.items()
        )
        (tmp_path / "a.png").write_bytes(png)
        # Pillow takes the high byte, so up to one step below the rounded value
        assert np.abs(pixels(load_image(tmp_path / "a.png")) - samples / 257).max() <= 1

    @pytest.mark.parametrize("white", [1.0, 255.0, 65535.0, 2**31 - 1])
    def test_deep_tiff_is_scaled_by_its_range(self, tmp_path, white):
        dtype = np.float32 if isinstance(white, float) else np.int32
        samples = (RNG.random((9, 11)) * white).astype(dtype)
        samples[0, :2] = 0, white
        Image.fromarray(samples).save(tmp_path / "a.tif")
        loaded = pixels(load_image(tmp_path / "a.tif"))
        assert np.abs(loaded[..., 0] - samples.astype(np.float64) * (255 / white)).max() <= 0.51

    def test_float_tiff_with_nan_inf_and_negatives(self, tmp_path):
        samples = np.array([[np.nan, np.inf, -np.inf, -3, 0.5, 1]], dtype=np.float32)
        Image.fromarray(samples).save(tmp_path / "a.tif")
        assert pixels(load_image(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 0, 0, 0, 128, 255]

    def test_cmyk_as_adobe_writes_it(self, tmp_path):
        # saved by Pillow with Adobe's marker and inverted inks; pure colours survive JPEG in flat
        # areas
        img = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
        img.save(tmp_path / "a.jpg", quality=95)
        assert np.abs(pixels(load_image(tmp_path / "a.jpg"))[16, 16] - (255, 0, 0)).max() <= 4

    def test_cmyk_profile_is_used_and_a_broken_one_is_not(self, tmp_path):
        img = Image.new("CMYK", (8, 8), (10, 200, 30, 40))
        plain = pixels(img.convert("RGB"))
        img.save(tmp_path / "plain.tif")
        img.save(tmp_path / "broken.tif", icc_profile=b"no profile at all")
        img.save(
            tmp_path / "rgb.tif",
            icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        )
        for name in ("plain", "broken", "rgb"):
            assert (pixels(load_image(tmp_path / f"{name}.tif")) == plain).all()

    def test_cmyk_goes_through_littlecms(self, tmp_path, monkeypatch):
        # no CMYK profile ships with Pillow, so only the call is observed
        seen = {}

        def convert(img, source, target, **options):
            seen.update(source=source.getvalue(), **options)
            return Image.new("RGB", img.size, (1, 2, 3))

        monkeypatch.setattr(ImageCms, "profileToProfile", convert)
        Image.new("CMYK", (8, 8)).save(tmp_path / "a.tif", icc_profile=b"press profile")
        assert pixels(load_image(tmp_path / "a.tif"))[0, 0].tolist() == [1, 2, 3]
        assert seen == {"source": b"press profile", "outputMode": "RGB"}

    @pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
    def test_an_animation_gives_its_first_frame(self, tmp_path, suffix):
        frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime")]
        options = {"lossless": True} if suffix == "webp" else {}
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
        assert Image.open(tmp_path / f"a.{suffix}").n_frames == 3
        assert (pixels(load_image(tmp_path / f"a.{suffix}")) == (255, 0, 0)).all()

    def test_exif_behind_the_pixels_of_a_png(self, tmp_path):
        exif = Image.Exif()
        exif[0x112] = 6
        Image.fromarray(noise(6, 10, 3)).save(tmp_path / "a.png")
        png, end = (tmp_path / "a.png").read_bytes()[:-12], png_chunk(b"IEND", b"")
        (tmp_path / "a.png").write_bytes(
            png + png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + end
        )
        assert image_size(tmp_path / "a.png") == load_image(tmp_path / "a.png").size == (6, 10)

    @pytest.mark.parametrize("suffix", ["tga", "ppm", "qoi", "dib", "j2k", "mpo"])
    def test_kinds_that_other_programs_write(self, tmp_path, suffix):
        img = Image.fromarray(noise(9, 11, 3))
        img.save(tmp_path / f"a.{suffix}")
        loaded = load_image(tmp_path / f"a.{suffix}")
        assert image_size(tmp_path / f"a.{suffix}") == loaded.size == (11, 9)
        if suffix != "mpo":
            assert (pixels(loaded) == pixels(img)).all()

    def test_deep_pgm_and_pfm(self, tmp_path):
        (tmp_path / "a.pgm").write_bytes(
            b"P5 3 1 65535\n" + np.array([0, 65535, 32768], ">u2").tobytes()
        )
        (tmp_path / "a.pfm").write_bytes(b"Pf\n2 1\n-1.0\n" + np.array([0.5, 1], "<f4").tobytes())
        assert pixels(load_image(tmp_path / "a.pgm"))[0, :, 0].tolist() == [0, 255, 128]
        assert pixels(load_image(tmp_path / "a.pfm"))[0, :, 0].tolist() == [128, 255]


class TestUnreadable:
    def refused(self, path, reason):
        with pytest.raises(UnreadableImage, match=reason) as caught:
            load_image(path)
        assert caught.value.path == path
        assert str(caught.value) == f"{path}: {caught.value.reason}"

    @pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "tif", "bmp"])
    @pytest.mark.parametrize("keep", [0.02, 0.5, 0.9])
    def test_truncated(self, tmp_path, suffix, keep):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(noise(64, 64, 3)).save(path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
        self.refused(path, "truncated|not an image|damaged")

    def test_empty_and_other_files(self, tmp_path):
        (tmp_path / "empty.png").touch()
        self.refused(tmp_path / "empty.png", "empty file")
        (tmp_path / "text.jpg").write_text("a text file, honestly" * 50)
        self.refused(tmp_path / "text.jpg", "not an image")
        self.refused(tmp_path / "none.jpg", "no such file")

    def test_a_postscript_file_is_not_run(self, tmp_path):
        Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
        (tmp_path / "a.eps").rename(tmp_path / "a.png")
        self.refused(tmp_path / "a.png", "not an image")

    def test_a_bomb_is_not_decoded(self, tmp_path, monkeypatch):
        Image.new("1", (300, 300)).save(tmp_path / "a.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        self.refused(tmp_path / "a.png", "more than 2,000 pixels")
        with pytest.raises(UnreadableImage, match="more than 2,000 pixels"):
            image_size(tmp_path / "a.png")

    # Pillow only warns of some damage
    @pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize(
        "suffix", ["jpg", "png", "gif", "webp", "tif", "bmp", "avif", "tga", "ppm", "qoi"]
    )
    def test_random_damage_never_raises_anything_else(self, tmp_path, suffix):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(noise(20, 30, 3)).save(path)
        data, rng = path.read_bytes(), np.random.default_rng(1)
        refused = 0
        for _ in range(100):
            broken = bytearray(data)
            for _ in range(rng.integers(1, 20)):
                broken[rng.integers(min(len(broken), 300))] = rng.integers(256)
            path.write_bytes(broken)
            for read in (image_size, load_image):
                try:
                    read(path)
                except UnreadableImage:
                    refused += 1
        assert refused > 20


def test_tensor_values_and_layout():
    array = noise(3, 5, 3)
    array[0, 0] = 0, 255, 51
    tensor = to_tensor(Image.fromarray(array))
    assert tensor.shape == (3, 3, 5)
    assert tensor.dtype == torch.float32
    assert tensor[:, 0, 0].tolist() == pytest.approx([-1, 1, -0.6])
    # fp32 rounding of x / 127.5 - 1
    expected = torch.from_numpy(array).permute(2, 0, 1).double() / 127.5 - 1
    torch.testing.assert_close(tensor.double(), expected, atol=2e-7, rtol=0)


class TestDecodedSmall:
    def test_a_jpeg_is_decoded_no_smaller_than_asked(self, tmp_path):
        photo(1600, 800).save(tmp_path / "a.jpg")
        whole = load_image(tmp_path / "a.jpg")
        for at_least, size in ((100, (200, 100)), (101, (400, 200)), (500, (1600, 800))):
            small = load_image(tmp_path / "a.jpg", at_least=at_least)
            assert small.size == size
            reduced = whole.resize(size, Image.Resampling.BOX)
            difference = np.abs(np.asarray(small).astype(int) - np.asarray(reduced))
            assert difference.mean() < 2

    def test_other_kinds_are_decoded_whole(self, tmp_path):
        photo(160, 80).save(tmp_path / "a.png")
        assert load_image(tmp_path / "a.png", at_least=10).size == (160, 80)

    def test_damage_is_found(self, tmp_path):
        photo(1600, 800).save(tmp_path / "a.jpg")
        (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-2000])
        with pytest.raises(UnreadableImage, match="truncated"):
            load_image(tmp_path / "a.jpg", at_least=100)
