"""List functions of TensorFlow and of Keras 2's backend that have no side effects."""

from __future__ import annotations

_FUNCTIONS_TEXT = """
abs acos acosh add add_n argmax argmin argsort asin asinh atan atan2 atanh batch_to_space bitcast
boolean_mask broadcast_to cast ceil clip_by_global_norm clip_by_norm clip_by_value complex concat
constant convert_to_tensor cos cosh cumsum depth_to_space diag diag_part div div_no_nan divide
dtypes.cast dtypes.complex dtypes.saturate_cast edit_distance einsum ensure_shape equal erf exp
expand_dims expm1 eye fill floor floor_div floordiv floormod foldl foldr gather gather_nd greater
greater_equal histogram_fixed_width identity identity_n imag is_finite is_inf is_nan less less_equal
linspace log log1p log_sigmoid logical_and logical_not logical_or logical_xor matmul matrix_band_part
matrix_inverse matrix_transpose maximum meshgrid minimum mod multinomial multiply negative norm not_equal
one_hot ones ones_like pad parallel_stack pow quantize random.categorical random.gamma random.normal
random.poisson random.shuffle random.stateless_normal random.stateless_uniform random.truncated_normal
random.uniform random_normal random_uniform range rank real realdiv reciprocal reduce_all reduce_any
reduce_euclidean_norm reduce_logsumexp reduce_max reduce_mean reduce_min reduce_prod reduce_std
reduce_sum reduce_variance repeat reshape reverse reverse_sequence roll round rsqrt saturate_cast
scalar_mul scatter_nd searchsorted segment_max segment_mean segment_min segment_sum sequence_mask shape
shape_n sigmoid sign sin sinh size slice sort space_to_batch space_to_batch_nd space_to_depth split sqrt
square squared_difference squeeze stack stop_gradient strided_slice subtract tan tanh
tensor_scatter_nd_add tensor_scatter_nd_max tensor_scatter_nd_min tensor_scatter_nd_sub
tensor_scatter_nd_update tensordot tile to_double to_float to_int32 to_int64 trace transpose truediv
truncated_normal truncatediv truncatemod unique unique_with_counts unravel_index unsorted_segment_max
unsorted_segment_mean unsorted_segment_min unsorted_segment_sum unstack where where_v2 zeros zeros_like
"""

_IMAGE_FUNCTIONS_TEXT = """
adjust_brightness adjust_contrast adjust_gamma adjust_hue adjust_saturation central_crop
combined_non_max_suppression convert_image_dtype crop_and_resize crop_to_bounding_box extract_glimpse
extract_patches flip_left_right flip_up_down grayscale_to_rgb hsv_to_rgb image_gradients
non_max_suppression pad_to_bounding_box per_image_standardization psnr resize resize_area resize_bicubic
resize_bilinear resize_image_with_crop_or_pad resize_image_with_pad resize_images resize_nearest_neighbor
resize_with_crop_or_pad resize_with_pad rgb_to_grayscale rgb_to_hsv rgb_to_yiq rgb_to_yuv rot90
sobel_edges ssim ssim_multiscale total_variation transpose yiq_to_rgb yuv_to_rgb
"""

_BACKEND_FUNCTIONS_TEXT = """
abs all any arange argmax argmin batch_dot batch_flatten bias_add binary_crossentropy cast cast_to_floatx
categorical_crossentropy clip concatenate constant conv1d conv2d conv2d_transpose conv3d cos
ctc_batch_cost ctc_decode cumprod cumsum depthwise_conv2d dot dropout elu equal exp expand_dims eye
flatten gather greater greater_equal hard_sigmoid identity in_test_phase in_top_k in_train_phase
l2_normalize less less_equal local_conv1d local_conv2d log max maximum mean min minimum not_equal one_hot
ones ones_like permute_dimensions pool2d pool3d pow prod random_bernoulli random_binomial random_normal
random_uniform relu repeat repeat_elements reshape resize_images resize_volumes reverse round
separable_conv2d shape sigmoid sign sin slice softmax softplus softsign sparse_categorical_crossentropy
spatial_2d_padding spatial_3d_padding sqrt square squeeze stack std stop_gradient sum switch tanh
temporal_padding tile transpose truncated_normal var zeros zeros_like
"""

FUNCTIONS = frozenset(_FUNCTIONS_TEXT.split())
"""Functions below `tf` and below `tf.compat.v1`."""
IMAGE_FUNCTIONS = frozenset(_IMAGE_FUNCTIONS_TEXT.split())
"""Functions below `tf.image`."""
BACKEND_FUNCTIONS = frozenset(_BACKEND_FUNCTIONS_TEXT.split())
"""Functions below `tf.keras.backend`."""
